//! Layer normalisation of a residual sum (Ba, Kiros and Hinton 2016): `y = LN(residual + dropout(x))`.
//!
//! Three element-wise passes of a post-norm transformer are one here: while a row lies in the
//! first-level cache, its dropout, sum, mean, variance and output are made.
use crate::device::on_gpu;
use crate::{Dropout, Packing, View, ViewMut, cpu, dropout::Mask, simd, threads};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::{mem::MaybeUninit, ops::Range};

/// What [`backward`] needs.
#[derive(Clone, Debug)]
pub struct Saved {
    /// `residual + dropout(x)`, `[rows, hidden]`. It may be `x` itself.
    pub sum: Tensor,
    /// Each row's mean, `[rows]` in `f32`.
    pub mean: Tensor,
    /// Each row's `1 / √(variance + eps)`, `[rows]` in `f32`.
    pub rstd: Tensor,
}

/// Rows of one task. The gradients of gamma and beta are summed by task, then over the tasks in
/// their order: the same bits on any number of threads.
const ROWS: usize = 64;

/// `x` and `residual` `[rows, hidden]`, `gamma` and `beta` `[hidden]` → `[rows, hidden]`.
///
/// # Errors
/// Where shapes do not fit or the dropout probability is not in `[0, 1)`.
pub fn forward(
    x: &Tensor,
    residual: Option<&Tensor>,
    dropout: Option<(&Dropout, &Packing)>,
    gamma: View,
    beta: View,
    eps: f64,
) -> Result<(Tensor, Saved)> {
    const KERNEL: &str = "layer_norm::forward";
    let (rows, hidden) = cpu::matrix(KERNEL, "x", x)?;
    cpu::check_len(KERNEL, "gamma", gamma.len(), &[hidden])?;
    cpu::check_len(KERNEL, "beta", beta.len(), &[hidden])?;
    check_dropout(KERNEL, dropout, rows)?;
    if let Some(residual) = residual {
        cpu::check_dims(KERNEL, "residual", residual, x.dims(), "x")?;
    }
    on_gpu!(x.device(), |gpu| crate::gpu::layer_norm::forward(&*gpu, x, residual, dropout, gamma, beta, eps));
    let (gamma, beta) = (gamma.host(KERNEL, "gamma")?, beta.host(KERNEL, "beta")?);
    let x_data = cpu::read(KERNEL, "x", x)?;
    let x_data = &*x_data;
    let residual_data = residual.map(|r| cpu::read(KERNEL, "residual", r)).transpose()?;
    let residual_data = residual_data.as_deref();

    let tasks = rows.div_ceil(ROWS);
    let mut sum = (residual.is_some() || dropout.is_some()).then(|| cpu::uninit(rows * hidden));
    let sums: Vec<Option<&mut [MaybeUninit<f32>]>> = match &mut sum {
        Some(sum) => sum.chunks_mut(ROWS * hidden).map(Some).collect(),
        None => (0..tasks).map(|_| None).collect(),
    };
    let mut y = cpu::uninit(rows * hidden);
    let mut mean = vec![0.0; rows];
    let mut rstd = vec![0.0; rows];
    threads::install(|| {
        let statistics = mean.par_chunks_mut(ROWS).zip(rstd.par_chunks_mut(ROWS));
        y.par_chunks_mut(ROWS * hidden).zip(sums).zip(statistics).enumerate().for_each(
            |(task, ((y, mut sum), (mean, rstd)))| {
                let first = task * ROWS;
                for_each_segment(dropout, first..first + mean.len(), |rows, mask, element| {
                    let all = rows.start * hidden..rows.end * hidden;
                    let rows = rows.start - first..rows.end - first;
                    let part = rows.start * hidden..rows.end * hidden;
                    let (x, residual) = (&x_data[all.clone()], residual_data.map(|r| &r[all]));
                    let sum = sum.as_deref_mut().map(|sum| &mut sum[part.clone()]);
                    let (mean, rstd) = (&mut mean[rows.clone()], &mut rstd[rows]);
                    normalize(&mut y[part], sum, x, residual, mask, element * hidden, gamma, beta, eps, mean, rstd);
                });
            },
        );
    });
    let sum = match sum {
        // SAFETY: the tasks cover all rows, the segments each task's, and `normalize` writes each.
        Some(sum) => unsafe { cpu::tensor(sum, x.dims(), x) }?,
        None => x.clone(),
    };
    // SAFETY: as above.
    let y = unsafe { cpu::tensor(y, x.dims(), x) }?;
    let [mean, rstd] = [mean, rstd].map(|row| Tensor::from_vec(row, rows, x.device()));
    Ok((y, Saved { sum, mean: mean?, rstd: rstd? }))
}

/// `dy` `[rows, hidden]` → the gradients of `x` and, where there was one, of `residual`; those of
/// gamma and beta are added to `dgamma` and `dbeta`. `dy` is overwritten.
///
/// # Errors
/// Where shapes do not fit or the dropout probability is not in `[0, 1)`.
pub fn backward(
    saved: &Saved,
    dropout: Option<(&Dropout, &Packing)>,
    dy: Tensor,
    gamma: View,
    dgamma: Option<ViewMut>,
    dbeta: Option<ViewMut>,
    has_residual: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    const KERNEL: &str = "layer_norm::backward";
    let (rows, hidden) = cpu::matrix(KERNEL, "sum", &saved.sum)?;
    cpu::check_dims(KERNEL, "dy", &dy, &[rows, hidden], "y")?;
    cpu::check_len(KERNEL, "gamma", gamma.len(), &[hidden])?;
    check_dropout(KERNEL, dropout, rows)?;
    for (name, view) in [("dgamma", &dgamma), ("dbeta", &dbeta)] {
        if let Some(view) = view {
            cpu::check_len(KERNEL, name, view.len(), &[hidden])?;
        }
    }
    on_gpu!(saved.sum.device(), |gpu| {
        crate::gpu::layer_norm::backward(&*gpu, saved, dropout, dy, gamma, dgamma, dbeta, has_residual)
    });
    let gamma = gamma.host(KERNEL, "gamma")?;
    let sum = cpu::read(KERNEL, "sum", &saved.sum)?;
    let (mean, rstd) = (cpu::read(KERNEL, "mean", &saved.mean)?, cpu::read(KERNEL, "rstd", &saved.rstd)?);
    let (sum, mean, rstd) = (&*sum, &*mean, &*rstd);
    let mut partial = vec![0.0f32; rows.div_ceil(ROWS) * 2 * hidden];
    let dims = [rows, hidden];
    // With a residual its gradient takes dy's place, and x's is a tensor of its own.
    let mut dx = has_residual.then(|| cpu::uninit(rows * hidden));
    let dsum = cpu::update(KERNEL, "dy", dy, &[&saved.sum], |dy| {
        let dxs: Vec<Option<&mut [MaybeUninit<f32>]>> = match &mut dx {
            Some(dx) => dx.chunks_mut(ROWS * hidden).map(Some).collect(),
            None => dy.chunks(ROWS * hidden).map(|_| None).collect(),
        };
        threads::install(|| {
            let statistics = mean.par_chunks(ROWS).zip(rstd.par_chunks(ROWS));
            let inputs = sum.par_chunks(ROWS * hidden).zip(statistics);
            let outputs = dxs.into_par_iter().zip(partial.par_chunks_mut(2 * hidden));
            dy.par_chunks_mut(ROWS * hidden).zip(inputs).zip(outputs).enumerate().for_each(
                |(task, ((dy, (sum, (mean, rstd))), (mut dx, partial)))| {
                    let (dgamma, dbeta) = partial.split_at_mut(hidden);
                    denormalize(dy, sum, mean, rstd, gamma, dgamma, dbeta);
                    let first = task * ROWS;
                    for_each_segment(dropout, first..first + mean.len(), |rows, mask, element| {
                        let part = (rows.start - first) * hidden..(rows.end - first) * hidden;
                        match &mut dx {
                            Some(dx) => mask.write(&mut dx[part.clone()], &dy[part], element * hidden),
                            None => mask.apply(&mut dy[part], element * hidden),
                        }
                    });
                },
            );
        });
        Ok(())
    })?;
    for (i, (name, view)) in [("dgamma", dgamma), ("dbeta", dbeta)].into_iter().enumerate() {
        if let Some(view) = view {
            let view = view.into_host(KERNEL, name)?;
            for partial in partial.chunks_exact(2 * hidden) {
                for (total, &p) in view.iter_mut().zip(&partial[i * hidden..]) {
                    *total += p;
                }
            }
        }
    }
    Ok(match dx {
        // SAFETY: the tasks cover all rows, the segments each task's, and each was written.
        Some(dx) => (unsafe { cpu::tensor(dx, &dims, &dsum) }?, Some(dsum)),
        None => (dsum, None),
    })
}

fn check_dropout(kernel: &str, dropout: Option<(&Dropout, &Packing)>, rows: usize) -> Result<()> {
    if let Some((dropout, packing)) = dropout {
        dropout.check(kernel)?;
        packing.check(kernel, rows)?;
    }
    Ok(())
}

/// Calls `f(rows, mask, position of the first row in its sequence)`.
fn for_each_segment(
    dropout: Option<(&Dropout, &Packing)>,
    rows: Range<usize>,
    mut f: impl FnMut(Range<usize>, Mask, usize),
) {
    match dropout {
        Some((dropout, packing)) => {
            packing.segments(rows).for_each(|s| f(s.rows, dropout.mask(s.example_id), s.position));
        }
        None => f(rows, Mask::NONE, 0),
    }
}

simd::vectorized! {
    /// Rows of `y`, and of `sum` where it is wanted: without it, the sum is `x`.
    fn normalize(
        y: &mut [MaybeUninit<f32>],
        sum: Option<&mut [MaybeUninit<f32>]>,
        x: &[f32],
        residual: Option<&[f32]>,
        mask: Mask,
        first: usize,
        gamma: &[f32],
        beta: &[f32],
        eps: f64,
        means: &mut [f32],
        rstds: &mut [f32],
    ) {
        let mut sum = sum;
        let hidden = gamma.len();
        for (row, (mean_out, rstd_out)) in means.iter_mut().zip(rstds).enumerate() {
            let range = row * hidden..(row + 1) * hidden;
            let x = &x[range.clone()];
            let sum: &[f32] = match &mut sum {
                Some(sum) => {
                    let sum = &mut sum[range.clone()];
                    let first = first + range.start;
                    match residual {
                        Some(r) if mask.drops() => {
                            for (i, ((s, &x), &r)) in sum.iter_mut().zip(x).zip(&r[range.clone()]).enumerate() {
                                s.write(x.mul_add(mask.factor((first + i) as u32), r));
                            }
                        }
                        Some(r) => {
                            for ((s, &x), &r) in sum.iter_mut().zip(x).zip(&r[range.clone()]) {
                                s.write(x + r);
                            }
                        }
                        None => {
                            for (i, (s, &x)) in sum.iter_mut().zip(x).enumerate() {
                                s.write(x * mask.factor((first + i) as u32));
                            }
                        }
                    }
                    // SAFETY: each branch wrote the whole row.
                    unsafe { cpu::assume_init_mut(sum) }
                }
                None => x,
            };
            // Two passes over a row in cache: the one-pass formula cancels where the mean is large.
            let mean = simd::sum(sum, sum, |a, _| a) / hidden as f32;
            let variance = simd::sum(sum, sum, |a, _| (a - mean) * (a - mean)) / hidden as f32;
            let rstd = (1.0 / (f64::from(variance) + eps).sqrt()) as f32;
            for (((y, &s), &g), &b) in y[range].iter_mut().zip(sum).zip(gamma).zip(beta) {
                y.write(((s - mean) * rstd).mul_add(g, b));
            }
            *mean_out = mean;
            *rstd_out = rstd;
        }
    }
}

simd::vectorized! {
    /// Rows of `dy` become those of the sum's gradient; what gamma and beta get is added to theirs.
    fn denormalize(
        dy: &mut [f32],
        sum: &[f32],
        means: &[f32],
        rstds: &[f32],
        gamma: &[f32],
        dgamma: &mut [f32],
        dbeta: &mut [f32],
    ) {
        let hidden = gamma.len();
        let mut normed = vec![0.0f32; hidden]; // (sum - mean) · rstd
        let rows = dy.chunks_exact_mut(hidden).zip(sum.chunks_exact(hidden));
        for ((dy, sum), (&mean, &rstd)) in rows.zip(means.iter().zip(rstds)) {
            for (((n, &s), &d), (dg, db)) in
                normed.iter_mut().zip(sum).zip(&*dy).zip(dgamma.iter_mut().zip(dbeta.iter_mut()))
            {
                *n = (s - mean) * rstd;
                *dg += d * *n;
                *db += d;
            }
            for (d, &g) in dy.iter_mut().zip(gamma) {
                *d *= g;
            }
            let mean_d = simd::sum(dy, dy, |d, _| d) / hidden as f32;
            let mean_dn = simd::sum(dy, &normed, |d, n| d * n) / hidden as f32;
            for (d, &n) in dy.iter_mut().zip(&normed) {
                *d = rstd * (*d - mean_d - n * mean_dn);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Device, dropout, testing::*};
    use candle_core::{D, Var};
    use proptest::prelude::*;

    const EPS: f64 = 1e-12;
    const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 1, step: 2, site: 3 };

    struct Case {
        x: Tensor,
        residual: Option<Tensor>,
        dropout: Option<Packing>,
        parameters: Buffer, // gamma, then beta
        dy: Tensor,
    }

    impl Case {
        fn new(lengths: &[u32], hidden: usize, residual: bool, dropout: bool) -> Self {
            let packing = packing(lengths);
            let dims = [packing.tokens(), hidden];
            Case {
                x: tensor(1, &dims),
                residual: residual.then(|| tensor(2, &dims).affine(2.0, 0.5).unwrap()),
                dropout: dropout.then_some(packing),
                parameters: buffer(3, 2 * hidden),
                dy: tensor(4, &dims),
            }
        }

        fn hidden(&self) -> usize {
            self.x.dims()[1]
        }

        fn dropout(&self) -> Option<(&Dropout, &Packing)> {
            self.dropout.as_ref().map(|packing| (&DROPOUT, packing))
        }

        fn forward(&self) -> Result<(Tensor, Saved)> {
            let h = self.hidden();
            let (gamma, beta) = (self.parameters.view(0..h), self.parameters.view(h..2 * h));
            forward(&self.x, self.residual.as_ref(), self.dropout(), gamma, beta, EPS)
        }

        /// dx, dresidual, and the gradients of gamma and beta, which are added to `before`.
        fn backward(&self, before: f32) -> Result<(Tensor, Option<Tensor>, Vec<f32>)> {
            let h = self.hidden();
            let (_, saved) = self.forward()?;
            let mut gradients = Buffer::zeros(2 * h, &Device::Cpu)?;
            gradients.fill(before)?;
            let [dgamma, dbeta] = gradients.views_mut([0..h, h..2 * h])?;
            let gamma = self.parameters.view(0..h);
            let dy = self.dy.copy()?;
            let (dx, dresidual) =
                backward(&saved, self.dropout(), dy, gamma, Some(dgamma), Some(dbeta), self.residual.is_some())?;
            Ok((dx, dresidual, all(&gradients)))
        }

        fn is_its_twin(&self) -> Result<()> {
            let h = self.hidden();
            let var = |t: &Tensor| Var::from_tensor(t).unwrap();
            let x = var(&self.x);
            let residual = self.residual.as_ref().map(var);
            let gamma = var(&Tensor::from_vec(self.parameters.read(0..h)?, h, &Device::Cpu)?);
            let beta = var(&Tensor::from_vec(self.parameters.read(h..2 * h)?, h, &Device::Cpu)?);
            let mut sum = x.as_tensor().clone();
            if let Some(packing) = &self.dropout {
                sum = (sum * dropout::forward(&self.x.ones_like()?, &DROPOUT, packing)?)?;
            }
            if let Some(residual) = &residual {
                sum = (sum + residual.as_tensor())?;
            }
            let centred = sum.broadcast_sub(&sum.mean_keepdim(D::Minus1)?)?;
            let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
            let want = centred.broadcast_div(&deviation)?.broadcast_mul(&gamma)?.broadcast_add(&beta)?;
            assert_close("y", &values(&self.forward()?.0), &values(&want), TWIN);

            let twin = (want * &self.dy)?.sum_all()?.backward()?;
            let of = |var: &Var| values(twin.get(var).unwrap());
            let (dx, dresidual, gradients) = self.backward(3.0)?;
            assert_close("dx", &values(&dx), &of(&x), TWIN);
            assert_eq!(dresidual.is_some(), residual.is_some());
            if let (Some(got), Some(residual)) = (dresidual, &residual) {
                assert_close("dresidual", &values(&got), &of(residual), TWIN);
            }
            let added = |v: Vec<f32>| v.iter().map(|x| x + 3.0).collect::<Vec<_>>();
            assert_close("dgamma", &gradients[..h], &added(of(&gamma)), TWIN);
            assert_close("dbeta", &gradients[h..], &added(of(&beta)), TWIN);
            Ok(())
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn is_its_twin(
            lengths in prop::collection::vec(1u32..60, 1..6),
            hidden in 4usize..80,
            residual: bool,
            dropout: bool,
        ) {
            Case::new(&lengths, hidden, residual, dropout).is_its_twin().unwrap();
        }
    }

    #[test]
    fn gradients_are_finite_differences() -> Result<()> {
        for (residual, dropout) in [(false, false), (true, false), (false, true), (true, true)] {
            let case = Case::new(&[1, 3, 2], 9, residual, dropout);
            let (dx, dresidual, gradients) = case.backward(0.0)?;
            let at = |change: &dyn Fn(&mut Case)| {
                let mut case = Case::new(&[1, 3, 2], 9, residual, dropout);
                change(&mut case);
                Ok(loss(&case.forward()?.0, &case.dy))
            };
            let dims = case.x.dims();
            check_gradient("dx", &values(&case.x), &values(&dx), |x| {
                at(&|case| case.x = Tensor::from_slice(x, dims, &Device::Cpu).unwrap())
            });
            if let (Some(r), Some(dresidual)) = (&case.residual, dresidual) {
                check_gradient("dresidual", &values(r), &values(&dresidual), |r| {
                    at(&|case| case.residual = Tensor::from_slice(r, dims, &Device::Cpu).ok())
                });
            }
            check_gradient("dgamma, dbeta", &all(&case.parameters), &gradients, |p| {
                at(&|case| case.parameters.write(0, p).unwrap())
            });
        }
        Ok(())
    }

    /// A large mean takes all digits of the one-pass variance.
    #[test]
    fn a_large_mean_costs_no_digits_of_the_variance() -> Result<()> {
        let (ones, zeros) = (vec![1.0; 64], vec![0.0; 64]);
        let x: Vec<f32> = (0..64).map(|i| 4096.0 + (i % 8) as f32).collect();
        let x = Tensor::from_vec(x, (1, 64), &Device::Cpu)?;
        let (_, saved) = forward(&x, None, None, View::from(&ones[..]), View::from(&zeros[..]), 0.0)?;
        assert_close("rstd", &values(&saved.rstd), &[1.0 / 5.25f32.sqrt()], 1e-6);
        Ok(())
    }
}
