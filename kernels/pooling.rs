//! One row from each sequence: its first, as BERT's pooler takes it.
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
    let data = cpu::read(KERNEL, "dy", dy)?;
    let mut dx = vec![0.0; packing.tokens() * hidden];
    for (i, dy) in data.chunks_exact(hidden).enumerate() {
        let row = packing.rows(i).start;
        dx[row * hidden..(row + 1) * hidden].copy_from_slice(dy);
    }
    Tensor::from_vec(dx, (packing.tokens(), hidden), dy.device())
}
