//! Sums over the rows of a matrix, for the gradients of biases and norms.
use super::{Arg, Gpu, Launch, Module, operands::*};
use candle_core::{DType, Result, Tensor};

const MODULE: Module = Module { name: "columns", source: include_str!("../columns.cu") };

/// Rows that are summed to one partial sum.
const SHARE: usize = 128;

/// `to[j] += Σ x[·, j]` for `x` `[rows, columns]`.
pub(crate) fn add_sums(gpu: &impl Gpu, operands: &Operands, to: Arg, name: &str, x: &Tensor) -> Result<()> {
    let (rows, columns) = (x.dims()[0], x.dims()[1]);
    let shares = rows.div_ceil(SHARE);
    let partial = operands.empty_of(&[shares, columns], DType::F32)?;
    let x = operands.activation(name, x)?;
    let vectors = vectors(&[x], columns, operands.vector());
    let width = if vectors == Arg::U32(1) { 32 * operands.vector() } else { 32 };
    let sizes = [rows, columns, SHARE].map(|size| Arg::U32(size as u32));
    let args = [operands.tensor("partial", &partial, DType::F32)?, x, sizes[0], sizes[1], sizes[2], vectors];
    let launch =
        Launch { grid: [columns.div_ceil(width) as u32, shares as u32, 1], block: [32, 8, 1], shared_bytes: 0 };
    gpu.launch(&MODULE, &operands.entry("partial"), launch, &args)?;
    add_total(gpu, operands, [to, Arg::Pointer(0)], &partial, columns)
}

/// Adds the column sums of `partial` `[parts, columns]`, those below `split` to the first and the
/// others to the second; null is not wanted.
pub(crate) fn add_total(
    gpu: &impl Gpu,
    operands: &Operands,
    [first, second]: [Arg; 2],
    partial: &Tensor,
    split: usize,
) -> Result<()> {
    let (parts, columns) = (partial.dims()[0], partial.dims()[1]);
    let partial = operands.tensor("partial", partial, DType::F32)?;
    let args = [first, second, partial].into_iter().chain([parts, columns, split].map(|size| Arg::U32(size as u32)));
    let launch = Launch { grid: [columns.div_ceil(32) as u32, 1, 1], block: [32, 8, 1], shared_bytes: 0 };
    gpu.launch(&MODULE, "total", launch, &args.collect::<Vec<_>>())
}

/// `y[·, j] += bias[j]`, both of the activations' dtype.
pub(crate) fn add_bias(gpu: &impl Gpu, operands: &Operands, y: &Tensor, bias: Arg) -> Result<()> {
    let n = y.elem_count();
    let args = [operands.activation("y", y)?, bias, Arg::U64(n as u64), Arg::U32(y.dims()[1] as u32)];
    gpu.launch(&MODULE, &operands.entry("add_bias"), Launch::each(n), &args)
}
