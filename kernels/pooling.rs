//! One row from each sequence: its first, as BERT's pooler takes it.
use crate::device::on_gpu;
use crate::{Packing, cpu};
use candle_core::{Result, Tensor};

/// `x` `[tokens, hidden]` → `[sequences, hidden]`.
///
/// # Errors
/// Where the packing does not fit.
pub fn first(x: &Tensor, packing: &Packing) -> Result<Tensor> {
    const KERNEL: &str = "pooling::first";
    let (rows, hidden) = cpu::matrix(KERNEL, "x", x)?;
    packing.check(KERNEL, rows)?;
    on_gpu!(x.device(), |gpu| crate::gpu::pooling::first(&*gpu, x, packing));
    let data = cpu::read(KERNEL, "x", x)?;
    let mut y = Vec::with_capacity(packing.sequences() * hidden);
    for i in 0..packing.sequences() {
        let row = packing.rows(i).start;
        y.extend_from_slice(&data[row * hidden..(row + 1) * hidden]);
    }
    Tensor::from_vec(y, (packing.sequences(), hidden), x.device())
}

/// `dy` `[sequences, hidden]` → the gradient of `x` `[tokens, hidden]`.
///
/// # Errors
/// Where the packing does not fit.
pub fn first_backward(dy: &Tensor, packing: &Packing) -> Result<Tensor> {
    const KERNEL: &str = "pooling::first_backward";
    let (_, hidden) = cpu::matrix(KERNEL, "dy", dy)?;
    cpu::check_dims(KERNEL, "dy", dy, &[packing.sequences(), hidden], "the packing")?;
    on_gpu!(dy.device(), |gpu| crate::gpu::pooling::first_backward(&*gpu, dy, packing));
    let data = cpu::read(KERNEL, "dy", dy)?;
    let mut dx = vec![0.0; packing.tokens() * hidden];
    for (i, dy) in data.chunks_exact(hidden).enumerate() {
        let row = packing.rows(i).start;
        dx[row * hidden..(row + 1) * hidden].copy_from_slice(dy);
    }
    Tensor::from_vec(dx, (packing.tokens(), hidden), dy.device())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, testing::*};
    use candle_core::Var;

    #[test]
    fn is_its_twin_and_finite_differences() -> Result<()> {
        let packing = packing(&[1, 5, 3, 1]);
        let x = Var::from_tensor(&tensor(1, &[10, 6]))?;
        let dy = tensor(2, &[4, 6]);
        let want = x.index_select(&Tensor::new(&[0u32, 1, 6, 9], &Device::Cpu)?, 0)?;
        assert_eq!(values(&first(&x, &packing)?), values(&want));
        let gradients = (want * &dy)?.sum_all()?.backward()?;
        let dx = values(&first_backward(&dy, &packing)?);
        assert_eq!(dx, values(gradients.get(&x).unwrap()));
        check_gradient("dx", &values(&x), &dx, |x| {
            Ok(loss(&first(&Tensor::from_slice(x, (10, 6), &Device::Cpu)?, &packing)?, &dy))
        });
        assert!(first(&tensor(1, &[9, 6]), &packing).is_err());
        assert!(first_backward(&tensor(1, &[3, 6]), &packing).is_err());
        Ok(())
    }
}
