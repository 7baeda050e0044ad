//! Launches of [`norm`](crate::norm).
use super::{Arg, Gpu, Launch, Module, operands::Operands, segments::Segments};
use crate::Buffer;
use candle_core::{DType, Result, Tensor};
use std::ops::Range;

const MODULE: Module = Module { name: "norm", source: include_str!("../norm.cu") };

/// `Σ g²` over the ranges, which are in bounds: one number in F64, on the device.
pub(crate) fn sum_of_squares(gpu: &impl Gpu, gradients: &Buffer, ranges: &[Range<usize>]) -> Result<Tensor> {
    let operands = Operands::new("norm::global", gradients.device(), DType::F32)?;
    let ranges: Vec<Range<usize>> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
    if ranges.is_empty() {
        return Tensor::zeros(1, DType::F64, gradients.device());
    }
    let segments = Segments::new(&ranges, gradients.device())?;
    let (arrays, count) = segments.args(&operands)?;
    let partial = operands.empty_of(&[segments.blocks], DType::F64)?;
    let sum = operands.empty_of(&[1], DType::F64)?;
    let gradients = operands.parameter("gradients", gradients.view(0..gradients.len()))?;
    let partial = operands.tensor("partial", &partial, DType::F64)?;
    gpu.launch(&MODULE, "squares", segments.launch(), &[partial, gradients, arrays[0], arrays[1], count])?;
    let args = [operands.tensor("sum", &sum, DType::F64)?, partial, Arg::U32(segments.blocks as u32)];
    gpu.launch(&MODULE, "total", Launch { grid: [1; 3], block: [256, 1, 1], shared_bytes: 0 }, &args)?;
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::super::{linear::Blas, testing::*};
    use super::*;
    use crate::testing::*;

    gpu_tests!(is_the_cpus);

    fn is_the_cpus(case: &Case<impl Blas>) -> Result<()> {
        let host = buffer(1, 30_003);
        let gradients = case.buffer(&host)?;
        for ranges in [vec![], vec![5..6, 8..8], vec![0..7, 20..9_001, 9_002..9_002, 12_000..30_003]] {
            let sum = sum_of_squares(case.gpu, &gradients, &ranges)?.to_vec1::<f64>()?[0];
            let want = crate::norm::global(&host, &ranges)?;
            assert!((sum.sqrt() - want).abs() <= 1e-12 * want, "{ranges:?}: {} {want}", sum.sqrt());
        }
        Ok(())
    }
}
