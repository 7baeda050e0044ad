//! Parts of a flat buffer that one launch goes through.
use super::{Arg, Launch, operands::Operands};
use candle_core::{DType, Device, Result, Tensor};
use std::ops::Range;

/// Elements of a block: `elements.cuh` has the same.
const CHUNK: usize = 8192;

/// The arrays that `each_of_segment` reads.
pub(crate) struct Segments {
    first_blocks: Tensor, // [segments + 1]
    bounds: Tensor,       // [segments, 2]
    pub blocks: usize,
    segments: usize,
}

impl Segments {
    /// None of the ranges is empty.
    pub fn new(ranges: &[Range<usize>], device: &Device) -> Result<Self> {
        let mut first_blocks = vec![0];
        let mut blocks = 0;
        for range in ranges {
            blocks += (range.end - range.start / 4 * 4).div_ceil(CHUNK);
            first_blocks.push(blocks as u32);
        }
        let bounds: Vec<i64> = ranges.iter().flat_map(|r| [r.start as i64, r.end as i64]).collect();
        Ok(Self {
            first_blocks: Tensor::from_vec(first_blocks, ranges.len() + 1, device)?,
            bounds: Tensor::from_vec(bounds, 2 * ranges.len(), device)?,
            blocks,
            segments: ranges.len(),
        })
    }

    /// `(first_blocks, bounds)` and their number.
    pub fn args(&self, operands: &Operands) -> Result<([Arg; 2], Arg)> {
        let arrays = [
            operands.tensor("first_blocks", &self.first_blocks, DType::U32)?,
            operands.tensor("bounds", &self.bounds, DType::I64)?,
        ];
        Ok((arrays, Arg::U32(self.segments as u32)))
    }

    pub fn launch(&self) -> Launch {
        Launch { grid: [self.blocks as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 }
    }
}
