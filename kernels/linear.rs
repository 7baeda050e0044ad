//! `y = x·Wᵀ + b`.
//!
//! Each sum of the product starts from its bias, so that the bias costs nothing. Threads own rows of
//! what they write (tokens of `y` and `dx`, outputs of `dW`), so nothing is reduced between them.
use crate::device::on_gpu;
use crate::{
    View, ViewMut, cpu,
    product::{self, Matrix},
    simd, threads,
};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// Where the gradient of an input goes.
#[derive(Debug)]
pub enum Grad {
    /// It is not wanted.
    Skip,
    /// Into a new tensor.
    New,
    /// Added into this one, in place.
    Into(Tensor),
}

/// Rows of `dy` that are summed to one partial sum of `db`: short sums keep its rounding small.
const BIAS_ROWS: usize = 64;

/// `x` `[rows, in]`, `w` `[out, in]`, `b` `[out]` → `[rows, out]`.
///
/// # Errors
/// Where shapes do not fit.
pub fn forward(x: &Tensor, w: View, b: Option<View>) -> Result<Tensor> {
    const KERNEL: &str = "linear::forward";
    let (rows, inputs) = cpu::matrix(KERNEL, "x", x)?;
    let outputs = outputs(KERNEL, inputs, w)?;
    if let Some(b) = b {
        cpu::check_len(KERNEL, "b", b.len(), &[outputs])?;
    }
    on_gpu!(x.device(), |gpu| crate::gpu::linear::forward(&*gpu, x, w, b));
    let (w, b) = (w.host(KERNEL, "w")?, b.map(|b| b.host(KERNEL, "b")).transpose()?);
    let data = cpu::read(KERNEL, "x", x)?;
    let mut y = cpu::uninit(rows * outputs);
    let w = Matrix::new(w, inputs).transposed();
    product::write(&mut y, Matrix::new(&data, inputs), w, b);
    // SAFETY: the product wrote all of y.
    unsafe { cpu::tensor(y, &[rows, outputs], x) }
}

/// `dx = dy·W` goes where `dx` says; `dw += dyᵀ·x`; `db += Σ dy` over rows. `x` `[rows, in]`,
/// `dy` `[rows, out]`. Returns `dx`.
///
/// # Errors
/// Where shapes do not fit.
pub fn backward(
    x: &Tensor,
    dy: &Tensor,
    w: View,
    dx: Grad,
    dw: Option<ViewMut>,
    db: Option<ViewMut>,
) -> Result<Option<Tensor>> {
    const KERNEL: &str = "linear::backward";
    let (rows, inputs) = cpu::matrix(KERNEL, "x", x)?;
    let outputs = outputs(KERNEL, inputs, w)?;
    cpu::check_dims(KERNEL, "dy", dy, &[rows, outputs], "y")?;
    if let Some(dw) = &dw {
        cpu::check_len(KERNEL, "dw", dw.len(), &[outputs, inputs])?;
    }
    if let Some(db) = &db {
        cpu::check_len(KERNEL, "db", db.len(), &[outputs])?;
    }
    on_gpu!(x.device(), |gpu| crate::gpu::linear::backward(&*gpu, x, dy, w, dx, dw, db));
    let w = w.host(KERNEL, "w")?;
    let x_data = cpu::read(KERNEL, "x", x)?;
    let dy_data = cpu::read(KERNEL, "dy", dy)?;
    let (x_data, dy_data) = (&*x_data, &*dy_data);

    if let Some(dw) = dw {
        product::add(
            dw.into_host(KERNEL, "dw")?,
            Matrix::new(dy_data, outputs).transposed(),
            Matrix::new(x_data, inputs),
        );
    }
    if let Some(db) = db {
        let db = db.into_host(KERNEL, "db")?;
        threads::install(|| {
            let share = threads::share(outputs, 64);
            db.par_chunks_mut(share).enumerate().for_each(|(i, db)| add_columns(db, dy_data, outputs, i * share));
        });
    }

    let (dy_matrix, w) = (Matrix::new(dy_data, outputs), Matrix::new(w, inputs));
    match dx {
        Grad::Skip => Ok(None),
        Grad::New => {
            let mut dx = cpu::uninit(rows * inputs);
            product::write(&mut dx, dy_matrix, w, None);
            // SAFETY: the product wrote all of dx.
            Ok(Some(unsafe { cpu::tensor(dx, &[rows, inputs], x) }?))
        }
        Grad::Into(dx) => {
            cpu::check_dims(KERNEL, "dx", &dx, &[rows, inputs], "x")?;
            cpu::update(KERNEL, "dx", dx, &[x, dy], |dx| {
                product::add(dx, dy_matrix, w);
                Ok(())
            })
            .map(Some)
        }
    }
}

simd::vectorized! {
    /// `db[j] += Σ dy[·, first + j]`
    fn add_columns(db: &mut [f32], dy: &[f32], outputs: usize, first: usize) {
        let mut partial = vec![0.0f32; db.len()];
        for block in dy.chunks(BIAS_ROWS * outputs) {
            partial.fill(0.0);
            for row in block.chunks_exact(outputs) {
                for (p, &d) in partial.iter_mut().zip(&row[first..]) {
                    *p += d;
                }
            }
            for (db, &p) in db.iter_mut().zip(&partial) {
                *db += p;
            }
        }
    }
}

pub(crate) fn outputs(kernel: &str, inputs: usize, w: View) -> Result<usize> {
    if inputs == 0 || w.is_empty() || !w.len().is_multiple_of(inputs) {
        bail!("{kernel}: w has {} elements: needs [out, {inputs}], as x has {inputs} columns", w.len());
    }
    Ok(w.len() / inputs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Device, testing::*};
    use candle_core::Var;
    use proptest::prelude::*;

    struct Gradients {
        dx: Option<Tensor>,
        dw: Vec<f32>,
        db: Vec<f32>,
    }

    /// Gradients by the kernel, added to ones that were there.
    fn run(x: &Tensor, dy: &Tensor, w: &Buffer, dx: Grad, before: f32) -> Result<Gradients> {
        let outputs = dy.dims()[1];
        let mut gradients = Buffer::zeros(w.len() + outputs, &Device::Cpu)?;
        gradients.fill(before)?;
        let [dw, db] = gradients.views_mut([0..w.len(), w.len()..w.len() + outputs])?;
        let dx = backward(x, dy, w.view(0..w.len()), dx, Some(dw), Some(db))?;
        let mut dw = all(&gradients);
        let db = dw.split_off(w.len());
        Ok(Gradients { dx, dw, db })
    }

    fn compare(rows: usize, inputs: usize, outputs: usize) -> Result<()> {
        let (x, dy) = (tensor(1, &[rows, inputs]), tensor(2, &[rows, outputs]));
        let (w, b) = (buffer(1, outputs * inputs), buffer(2, outputs));
        let y = forward(&x, w.view(0..w.len()), Some(b.view(0..outputs)))?;
        let plain = forward(&x, w.view(0..w.len()), None)?;

        let twin = [as_tensor(&w, &[outputs, inputs]), as_tensor(&b, &[outputs]), x.clone()];
        let [tw, tb, tx] = twin.map(|t| Var::from_tensor(&t).unwrap());
        let product = tx.matmul(&tw.t()?)?;
        let want = product.broadcast_add(&tb)?;
        assert_close("y", &values(&y), &values(&want), TWIN);
        assert_close("y without bias", &values(&plain), &values(&product), TWIN);

        let twin = (want * &dy)?.sum_all()?.backward()?;
        let of = |var: &Var| values(&twin.get(var).unwrap().contiguous().unwrap());
        let got = run(&x, &dy, &w, Grad::New, 0.0)?;
        assert_close("dx", &values(&got.dx.unwrap()), &of(&tx), TWIN);
        assert_close("dw", &got.dw, &of(&tw), TWIN);
        assert_close("db", &got.db, &of(&tb), TWIN);

        let base = tensor(3, &[rows, inputs]);
        let got = run(&x, &dy, &w, Grad::Into(base.copy()?), 3.0)?;
        assert_close("dx, added", &values(&got.dx.unwrap()), &values(&(base + twin.get(&tx).unwrap())?), TWIN);
        let added = |v: Vec<f32>| v.iter().map(|x| x + 3.0).collect::<Vec<_>>();
        assert_close("dw, added", &got.dw, &added(of(&tw)), TWIN);
        assert_close("db, added", &got.db, &added(of(&tb)), TWIN);
        assert!(run(&x, &dy, &w, Grad::Skip, 0.0)?.dx.is_none());
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn is_its_twin(rows in 1usize..150, inputs in 1usize..90, outputs in 1usize..150) {
            compare(rows, inputs, outputs).unwrap();
        }
    }

    #[test]
    fn is_its_twin_at_a_models_size() -> Result<()> {
        compare(300, 384, 512)
    }

    #[test]
    fn gradients_are_finite_differences() -> Result<()> {
        let (rows, inputs, outputs) = (5, 7, 6);
        let (x, dy, w) = (tensor(1, &[rows, inputs]), tensor(2, &[rows, outputs]), buffer(1, outputs * inputs));
        let got = run(&x, &dy, &w, Grad::New, 0.0)?;
        let b = vec![0.0; outputs];
        let f = |x: &[f32], w: &[f32], b: &[f32]| {
            let x = Tensor::from_slice(x, (rows, inputs), &Device::Cpu)?;
            Ok(loss(&forward(&x, View::from(w), Some(View::from(b)))?, &dy))
        };
        let (x, w) = (values(&x), all(&w));
        check_gradient("dx", &x, &values(&got.dx.unwrap()), |x| f(x, &w, &b));
        check_gradient("dw", &w, &got.dw, |w| f(&x, w, &b));
        check_gradient("db", &b, &got.db, |b| f(&x, &w, b));
        Ok(())
    }

    #[test]
    fn a_gradient_that_shares_an_inputs_storage_is_copied() -> Result<()> {
        let (x, dy, w) = (tensor(1, &[4, 4]), tensor(2, &[4, 4]), buffer(1, 16));
        let want = run(&x, &dy, &w, Grad::Into(dy.copy()?), 0.0)?.dx.unwrap();
        let got = run(&x, &dy, &w, Grad::Into(dy.clone()), 0.0)?.dx.unwrap();
        assert_eq!(values(&got), values(&want));
        assert_eq!(values(&dy), values(&tensor(2, &[4, 4])));
        Ok(())
    }

    #[test]
    fn errors_name_the_kernel_and_both_shapes() {
        let w = buffer(1, 12);
        let says = |result: Result<Tensor>, what: &[&str]| {
            let error = result.unwrap_err().to_string();
            what.iter().for_each(|what| assert!(error.contains(what), "{error}"));
        };
        says(forward(&tensor(1, &[2, 5]), w.view(0..12), None), &["linear::forward", "12", "[out, 5]"]);
        says(forward(&tensor(1, &[2, 4]), w.view(0..12), Some(w.view(0..2))), &["b has 2", "[3]"]);
        says(forward(&tensor(1, &[4, 2]).t().unwrap(), w.view(0..12), None), &["x", "contiguous"]);
        says(
            forward(&tensor(1, &[2, 4]).to_dtype(candle_core::DType::F64).unwrap(), w.view(0..12), None),
            &["F64", "F32"],
        );
        let (x, dy) = (tensor(1, &[2, 4]), tensor(1, &[2, 4]));
        let error = backward(&x, &dy, w.view(0..12), Grad::Skip, None, None).unwrap_err().to_string();
        assert!(error.contains("linear::backward: dy has shape [2, 4]: needs [2, 3]"), "{error}");
    }
}
