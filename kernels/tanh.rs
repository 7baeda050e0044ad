//! The hyperbolic tangent. It only ever sees pooled rows, so it is the standard library's.
use crate::cpu;
use crate::device::on_gpu;
use candle_core::{Result, Tensor};

/// Any shape → the same shape.
///
/// # Errors
/// Where `x` is not contiguous, or of a dtype that its device does not compute in.
pub fn forward(x: &Tensor) -> Result<Tensor> {
    on_gpu!(x.device(), |gpu| crate::gpu::elementwise::tanh(&*gpu, x));
    let y: Vec<f32> = cpu::read("tanh::forward", "x", x)?.iter().map(|x| x.tanh()).collect();
    Tensor::from_vec(y, x.dims(), x.device())
}

/// `y`, what [`forward`] gave, and `dy` of its shape → the gradient of `x`, in `dy`'s place.
///
/// # Errors
/// Where shapes differ.
pub fn backward(y: &Tensor, dy: Tensor) -> Result<Tensor> {
    const KERNEL: &str = "tanh::backward";
    cpu::check_dims(KERNEL, "dy", &dy, y.dims(), "y")?;
    on_gpu!(y.device(), |gpu| crate::gpu::elementwise::tanh_backward(&*gpu, y, dy));
    cpu::update(KERNEL, "dy", dy, &[y], |dy| {
        for (dy, &y) in dy.iter_mut().zip(&*cpu::read(KERNEL, "y", y)?) {
            *dy *= 1.0 - y * y;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, testing::*};
    use candle_core::Var;

    #[test]
    fn is_its_twin_and_finite_differences() -> Result<()> {
        let (x, dy) = (tensor(1, &[3, 17]), tensor(2, &[3, 17]));
        let twin = Var::from_tensor(&x)?;
        let want = twin.tanh()?;
        let y = forward(&x)?;
        assert_close("y", &values(&y), &values(&want), 1e-6);
        let gradients = (want * &dy)?.sum_all()?.backward()?;
        let dx = values(&backward(&y, dy.copy()?)?);
        assert_close("dx", &dx, &values(gradients.get(&twin).unwrap()), 1e-6);
        check_gradient("dx", &values(&x), &dx, |x| {
            Ok(loss(&forward(&Tensor::from_slice(x, (3, 17), &Device::Cpu)?)?, &dy))
        });
        Ok(())
    }
}
