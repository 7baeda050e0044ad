//! Launches of [`pooling`](crate::pooling).
use super::{Arg, Gpu, Launch, Module, operands::*};
use crate::{Packing, cpu};
use candle_core::{DType, Result, Tensor};

const MODULE: Module = Module { name: "pooling", source: include_str!("../pooling.cu") };

pub(crate) fn first(gpu: &impl Gpu, x: &Tensor, packing: &Packing) -> Result<Tensor> {
    const KERNEL: &str = "pooling::first";
    let (rows, hidden) = cpu::matrix(KERNEL, "x", x)?;
    packing.check(KERNEL, rows)?;
    let operands = Operands::like(KERNEL, "x", x)?;
    let y = operands.empty(&[packing.sequences(), hidden])?;
    let on = packing.on(x.device())?;
    let pointers = [operands.activation("y", &y)?, operands.activation("x", x)?];
    let (n, vector) = (y.elem_count(), operands.vector());
    let args = [
        pointers[0],
        pointers[1],
        operands.tensor("offsets", &on.offsets, DType::U32)?,
        Arg::U64(n as u64),
        Arg::U32(hidden as u32),
        vectors(&pointers, hidden, vector),
    ];
    gpu.launch(&MODULE, &operands.entry("first"), Launch::each(n.div_ceil(vector)), &args)?;
    Ok(y)
}

pub(crate) fn first_backward(gpu: &impl Gpu, dy: &Tensor, packing: &Packing) -> Result<Tensor> {
    const KERNEL: &str = "pooling::first_backward";
    let (_, hidden) = cpu::matrix(KERNEL, "dy", dy)?;
    cpu::check_dims(KERNEL, "dy", dy, &[packing.sequences(), hidden], "the packing")?;
    let operands = Operands::like(KERNEL, "dy", dy)?;
    let dx = operands.empty(&[packing.tokens(), hidden])?;
    let on = packing.on(dy.device())?;
    let pointers = [operands.activation("dx", &dx)?, operands.activation("dy", dy)?];
    let (n, vector) = (dx.elem_count(), operands.vector());
    let args = [
        pointers[0],
        pointers[1],
        operands.tensor("sequences", &on.sequences, DType::U32)?,
        operands.tensor("offsets", &on.offsets, DType::U32)?,
        Arg::U64(n as u64),
        Arg::U32(hidden as u32),
        vectors(&pointers, hidden, vector),
    ];
    gpu.launch(&MODULE, &operands.entry("first_backward"), Launch::each(n.div_ceil(vector)), &args)?;
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use super::super::{linear::Blas, testing::*};
    use super::*;
    use crate::testing::*;

    gpu_tests!(is_the_cpus);

    fn is_the_cpus(case: &Case<impl Blas>) -> Result<()> {
        for (lengths, hidden) in [(&[1, 5, 3, 1][..], 6), (&[100, 2], 64), (&[1], 8)] {
            let packing = packing(lengths);
            let x = case.inputs(&tensor(1, &[packing.tokens(), hidden]))?;
            let dy = case.inputs(&tensor(2, &[packing.sequences(), hidden]))?;
            // rows are copied: to the same bits
            let y = first(case.gpu, &x.device, &packing)?;
            case.close("y", &y, &crate::pooling::first(&x.host, &packing)?, 0.0);
            let dx = first_backward(case.gpu, &dy.device, &packing)?;
            case.close("dx", &dx, &crate::pooling::first_backward(&dy.host, &packing)?, 0.0);
        }
        Ok(())
    }
}
