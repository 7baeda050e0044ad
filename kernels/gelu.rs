//! The Gaussian error linear unit, `x·Φ(x)` with the exact `erf` (Hendrycks and Gimpel 2016).
use crate::device::on_gpu;
use crate::{cpu, simd, threads};
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Any shape → the same shape.
///
/// # Errors
/// Where `x` is not contiguous, or of a dtype that its device does not compute in.
pub fn forward(x: &Tensor) -> Result<Tensor> {
    on_gpu!(x.device(), |gpu| crate::gpu::elementwise::gelu(&*gpu, x));
    let data = cpu::read("gelu::forward", "x", x)?;
    let data = &*data;
    let mut y = cpu::uninit(data.len());
    threads::install(|| {
        let share = threads::share(data.len(), 4096);
        y.par_chunks_mut(share).zip(data.par_chunks(share)).for_each(|(y, x)| gelu(y, x));
    });
    // SAFETY: the chunks cover y, and each was written.
    unsafe { cpu::tensor(y, x.dims(), x) }
}

/// `dy` of `x`'s shape → the gradient of `x`, in `dy`'s place.
///
/// # Errors
/// Where shapes differ.
pub fn backward(x: &Tensor, dy: Tensor) -> Result<Tensor> {
    const KERNEL: &str = "gelu::backward";
    cpu::check_dims(KERNEL, "dy", &dy, x.dims(), "x")?;
    on_gpu!(x.device(), |gpu| crate::gpu::elementwise::gelu_backward(&*gpu, x, dy));
    cpu::update(KERNEL, "dy", dy, &[x], |dy| {
        let x = cpu::read(KERNEL, "x", x)?;
        let x = &*x;
        threads::install(|| {
            let share = threads::share(x.len(), 4096);
            dy.par_chunks_mut(share).zip(x.par_chunks(share)).for_each(|(dy, x)| gelu_backward(dy, x));
        });
        Ok(())
    })
}

/// Φ(x), the normal distribution function.
#[inline(always)]
fn cdf(x: f32) -> f32 {
    simd::erf(x * std::f32::consts::FRAC_1_SQRT_2).mul_add(0.5, 0.5)
}

simd::vectorized! {
    fn gelu(y: &mut [MaybeUninit<f32>], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            y.write(x * cdf(x));
        }
    }
}

simd::vectorized! {
    fn gelu_backward(dy: &mut [f32], x: &[f32]) {
        const FRAC_1_SQRT_TAU: f32 = 0.398_942_3;
        for (dy, &x) in dy.iter_mut().zip(x) {
            let density = FRAC_1_SQRT_TAU * simd::exp(-0.5 * x * x);
            *dy *= x.mul_add(density, cdf(x));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, testing::*};
    use candle_core::Var;

    #[test]
    fn is_its_twin_and_finite_differences() -> Result<()> {
        let (x, dy) = (tensor(1, &[33, 65]).affine(2.0, 0.0)?, tensor(2, &[33, 65]));
        let twin = Var::from_tensor(&x)?;
        let want = twin.gelu_erf()?;
        assert_close("y", &values(&forward(&x)?), &values(&want), 1e-6);
        let gradients = (want * &dy)?.sum_all()?.backward()?;
        let dx = values(&backward(&x, dy.copy()?)?);
        assert_close("dx", &dx, &values(gradients.get(&twin).unwrap()), 1e-6);
        check_gradient("dx", &values(&x), &dx, |x| {
            Ok(loss(&forward(&Tensor::from_slice(x, (33, 65), &Device::Cpu)?)?, &dy))
        });
        Ok(())
    }

    #[test]
    fn far_from_zero_it_is_zero_or_x() -> Result<()> {
        let x = Tensor::new(&[-1e30f32, -50.0, -9.0, 0.0, 9.0, 50.0, 1e30], &Device::Cpu)?;
        assert_eq!(values(&forward(&x)?), [0.0, 0.0, 0.0, 0.0, 9.0, 50.0, 1e30]);
        assert_close("dx", &values(&backward(&x, x.ones_like()?)?), &[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0], 1e-6);
        Ok(())
    }
}
