//! The rectified linear unit, `max(x, 0)` (Nair and Hinton 2010). It only ever sees pooled rows, so it is a plain
//! loop. What is not a number stays so.
use crate::cpu;
use crate::device::on_gpu;
use candle_core::{Result, Tensor};

/// Any shape → the same shape.
///
/// # Errors
/// Where `x` is not contiguous, or of a dtype that its device does not compute in.
pub fn forward(x: &Tensor) -> Result<Tensor> {
    on_gpu!(x.device(), |gpu| crate::gpu::elementwise::relu(&*gpu, x));
    let y: Vec<f32> = cpu::read("relu::forward", "x", x)?.iter().map(|&x| if x <= 0.0 { 0.0 } else { x }).collect();
    Tensor::from_vec(y, x.dims(), x.device())
}

/// `y`, what [`forward`] gave, and `dy` of its shape → the gradient of `x`, in `dy`'s place.
///
/// # Errors
/// Where shapes differ.
pub fn backward(y: &Tensor, dy: Tensor) -> Result<Tensor> {
    const KERNEL: &str = "relu::backward";
    cpu::check_dims(KERNEL, "dy", &dy, y.dims(), "y")?;
    on_gpu!(y.device(), |gpu| crate::gpu::elementwise::relu_backward(&*gpu, y, dy));
    cpu::update(KERNEL, "dy", dy, &[y], |dy| {
        for (dy, &y) in dy.iter_mut().zip(&*cpu::read(KERNEL, "y", y)?) {
            if y <= 0.0 {
                *dy = 0.0;
            }
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
        let want = twin.relu()?;
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

    #[test]
    fn not_a_number_stays_so() -> Result<()> {
        let x = Tensor::new(&[-0.0f32, f32::NAN, f32::NEG_INFINITY, f32::INFINITY], &Device::Cpu)?;
        let y = forward(&x)?;
        assert_eq!(format!("{:?}", values(&y)), "[0.0, NaN, 0.0, inf]");
        assert_eq!(values(&backward(&y, y.ones_like()?)?), [0.0, 1.0, 0.0, 1.0]);
        Ok(())
    }
}
