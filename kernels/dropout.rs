//! Dropout whose mask is never kept.
//!
//! Whether an element is dropped is a pure function of (seed, step, example id, site, element in
//! the example): backward makes the same mask again, and the same example gets the same mask in
//! any batch, on any number of machines.
use crate::device::on_gpu;
use crate::{Packing, cpu, random, simd, threads};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Which mask: one for each place in the model (site) at each optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// How likely an element is dropped; the others are multiplied by `1 / (1 - probability)`.
    pub probability: f32,
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// The place in the model.
    pub site: u32,
}

/// One example's mask.
#[derive(Clone, Copy)]
pub(crate) struct Mask {
    key: u64,
    threshold: u32,
    scale: f32,
}

impl Dropout {
    pub(crate) fn check(&self, kernel: &str) -> Result<()> {
        if !(0.0..1.0).contains(&self.probability) {
            bail!("{kernel}: dropout probability = {}: needs to be at least 0 and below 1", self.probability);
        }
        Ok(())
    }

    pub(crate) fn mask(&self, example_id: u64) -> Mask {
        let (threshold, scale) = self.threshold_and_scale();
        Mask { key: random::key(&[self.seed, self.step, example_id, u64::from(self.site)]), threshold, scale }
    }

    /// Elements whose random bits are below the threshold are dropped, the others scaled.
    pub(crate) fn threshold_and_scale(&self) -> (u32, f32) {
        ((f64::from(self.probability) * 2f64.powi(32)) as u32, 1.0 / (1.0 - self.probability))
    }
}

impl Mask {
    /// A mask that drops nothing.
    pub const NONE: Mask = Mask { key: 0, threshold: 0, scale: 1.0 };

    /// Whether any element is dropped or scaled.
    pub fn drops(self) -> bool {
        self.threshold > 0
    }

    /// `y = x` masked, where `x` starts at the example's element `first`.
    pub fn write(self, y: &mut [MaybeUninit<f32>], x: &[f32], first: usize) {
        write(y, x, self, first);
    }

    /// Masks `x`, which starts at the example's element `first`, in place.
    pub fn apply(self, x: &mut [f32], first: usize) {
        if self.drops() {
            apply(x, self, first);
        }
    }

    /// What element `element` of the example is multiplied by. Past 2³² elements it repeats.
    #[inline(always)]
    pub fn factor(self, element: u32) -> f32 {
        if random::bits(self.key, element) >= self.threshold { self.scale } else { 0.0 }
    }
}

/// `x` `[tokens, hidden]` → the same shape, masked and scaled.
///
/// # Errors
/// Where the packing does not fit or the probability is not in `[0, 1)`.
pub fn forward(x: &Tensor, dropout: &Dropout, packing: &Packing) -> Result<Tensor> {
    const KERNEL: &str = "dropout::forward";
    let (rows, hidden) = cpu::matrix(KERNEL, "x", x)?;
    packing.check(KERNEL, rows)?;
    dropout.check(KERNEL)?;
    on_gpu!(x.device(), |gpu| crate::gpu::dropout::forward(&*gpu, x, dropout, packing));
    let data = cpu::read(KERNEL, "x", x)?;
    let data = &*data;
    let mut y = cpu::uninit(data.len());
    threads::install(|| {
        let share = threads::share(rows, 64);
        y.par_chunks_mut(share * hidden).enumerate().for_each(|(i, y)| {
            let first = i * share;
            for s in packing.segments(first..first + y.len() / hidden) {
                let y = &mut y[(s.rows.start - first) * hidden..(s.rows.end - first) * hidden];
                let x = &data[s.rows.start * hidden..s.rows.end * hidden];
                dropout.mask(s.example_id).write(y, x, s.position * hidden);
            }
        });
    });
    // SAFETY: the chunks cover y, the segments each chunk.
    unsafe { cpu::tensor(y, x.dims(), x) }
}

/// The gradient of [`forward`]'s input from that of its output.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: Tensor, dropout: &Dropout, packing: &Packing) -> Result<Tensor> {
    // A mask is its own transpose.
    forward(&dy, dropout, packing)
}

simd::vectorized! {
    fn write(y: &mut [MaybeUninit<f32>], x: &[f32], mask: Mask, first: usize) {
        for (i, (y, &x)) in y.iter_mut().zip(x).enumerate() {
            y.write(x * mask.factor((first + i) as u32));
        }
    }
}

simd::vectorized! {
    fn apply(x: &mut [f32], mask: Mask, first: usize) {
        for (i, x) in x.iter_mut().enumerate() {
            *x *= mask.factor((first + i) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, testing::*};

    const DROPOUT: Dropout = Dropout { probability: 0.3, seed: 42, step: 5, site: 2 };

    /// The rows that `id` has in the masked tensor of ones.
    fn mask_in(lengths: &[(u64, u32)], id: u64, dropout: &Dropout) -> Vec<f32> {
        let mut offsets = vec![0];
        lengths.iter().for_each(|&(_, n)| offsets.push(offsets[offsets.len() - 1] + n));
        let packing = Packing::new(offsets, lengths.iter().map(|&(id, _)| id).collect()).unwrap();
        let x = Tensor::ones((packing.tokens(), 24), candle_core::DType::F32, &Device::Cpu).unwrap();
        let y = values(&forward(&x, dropout, &packing).unwrap());
        let rows = packing.rows(packing.example_ids().iter().position(|&i| i == id).unwrap());
        y[rows.start * 24..rows.end * 24].to_vec()
    }

    #[test]
    fn a_mask_depends_on_its_key_alone() {
        let alone = mask_in(&[(77, 9)], 77, &DROPOUT);
        assert_eq!(alone, mask_in(&[(3, 1), (4, 100), (77, 9), (5, 30)], 77, &DROPOUT));
        assert_eq!(alone, mask_in(&[(77, 9), (1, 200)], 77, &DROPOUT));
        // a longer text with the same id starts with the same bits
        assert_eq!(alone, mask_in(&[(77, 20)], 77, &DROPOUT)[..9 * 24]);
        assert_ne!(alone, mask_in(&[(78, 9)], 78, &DROPOUT));
        assert_ne!(alone, mask_in(&[(77, 9)], 77, &Dropout { seed: 43, ..DROPOUT }));
        assert_ne!(alone, mask_in(&[(77, 9)], 77, &Dropout { step: 6, ..DROPOUT }));
        assert_ne!(alone, mask_in(&[(77, 9)], 77, &Dropout { site: 3, ..DROPOUT }));
    }

    #[test]
    fn keeps_the_right_share() {
        for probability in [0.0, 0.1, 0.5, 0.9] {
            let mut kept = 0.0;
            let mut pairs = 0.0; // neighbours that are both kept
            let (ids, elements) = (40, 50_000);
            for id in 0..ids {
                let mask = Dropout { probability, ..DROPOUT }.mask(id);
                let keeps: Vec<bool> = (0..elements).map(|e| mask.factor(e) > 0.0).collect();
                kept += keeps.iter().filter(|&&k| k).count() as f64;
                pairs += keeps.windows(2).filter(|k| k[0] && k[1]).count() as f64;
                assert!(keeps.iter().zip(0..).all(|(&k, e)| !k || mask.factor(e) == 1.0 / (1.0 - probability)));
            }
            let n = ids as f64 * f64::from(elements);
            let keep = 1.0 - f64::from(probability);
            let five_errors = 5.0 * (keep * (1.0 - keep) / n).sqrt();
            assert!((kept / n - keep).abs() <= five_errors, "{probability}: kept {}", kept / n);
            assert!((pairs / n - keep * keep).abs() <= 3.0 * five_errors + 1e-4, "{probability}: pairs {}", pairs / n);
        }
    }

    #[test]
    fn masks_of_neighbouring_keys_are_independent() {
        let keeps = |id, site, step| -> Vec<bool> {
            let mask = Dropout { probability: 0.5, seed: 42, step, site }.mask(id);
            (0..100_000).map(|e| mask.factor(e) > 0.0).collect()
        };
        let one = keeps(1, 1, 1);
        for other in [keeps(2, 1, 1), keeps(1, 2, 1), keeps(1, 1, 2), keeps(2, 2, 2), keeps(0, 1, 1)] {
            let agree = one.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!((agree as f64 - 50_000.0).abs() < 5.0 * 158.2, "{agree} of 100000 agree"); // 5 σ
        }
    }

    #[test]
    fn backward_is_finite_differences() -> Result<()> {
        let packing = packing(&[1, 4, 2]);
        let (x, dy) = (tensor(1, &[7, 5]), tensor(2, &[7, 5]));
        let dx = backward(dy.clone(), &DROPOUT, &packing)?;
        check_gradient("dx", &values(&x), &values(&dx), |x| {
            let x = Tensor::from_slice(x, (7, 5), &Device::Cpu)?;
            Ok(loss(&forward(&x, &DROPOUT, &packing)?, &dy))
        });
        Ok(())
    }

    #[test]
    fn refuses_a_probability_of_one_and_rows_that_do_not_fit() {
        let x = tensor(1, &[3, 2]);
        assert!(forward(&x, &Dropout { probability: 1.0, ..DROPOUT }, &packing(&[3])).is_err());
        assert!(forward(&x, &Dropout { probability: f32::NAN, ..DROPOUT }, &packing(&[3])).is_err());
        let error = forward(&x, &DROPOUT, &packing(&[2, 2])).unwrap_err().to_string();
        assert!(error.contains("has 4 rows, the tensor 3"), "{error}");
    }
}
