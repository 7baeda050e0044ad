//! Flat memory for parameters, their gradients and the optimizer's moments.
use crate::{
    memory::{Lent, Memory},
    threads,
};
use candle_core::{Device, Result, bail};
use rayon::prelude::*;
use std::ops::Range;

/// Elements of one task.
const CHUNK: usize = 32768;

/// A flat array of `f32` on one device.
#[derive(Debug, Default)]
pub struct Buffer {
    data: Memory,
}

/// A contiguous part of a [`Buffer`], to read: a parameter.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(crate) data: &'a [f32],
}

/// A contiguous part of a [`Buffer`], to write: a parameter's gradient.
#[derive(Debug)]
pub struct ViewMut<'a> {
    pub(crate) data: &'a mut [f32],
}

impl Buffer {
    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// Where the device is not the CPU.
    pub fn zeros(len: usize, device: &Device) -> Result<Self> {
        Self::from_vec(vec![0.0; len], device)
    }

    /// A buffer that holds `data`.
    ///
    /// # Errors
    /// Where the device is not the CPU.
    pub fn from_vec(data: Vec<f32>, device: &Device) -> Result<Self> {
        if !device.is_cpu() {
            bail!("a buffer was asked for on {device:?}: kernels run on the CPU only");
        }
        Ok(Self { data: data.into() })
    }

    /// How many elements it holds.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A part, to read.
    ///
    /// # Panics
    /// Where the range goes past the end, as indexing a slice does.
    pub fn view(&self, range: Range<usize>) -> View<'_> {
        View { data: self.data.part(range) }
    }

    /// A part, to write.
    ///
    /// # Panics
    /// Where the range goes past the end, as indexing a slice does.
    pub fn view_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        ViewMut { data: self.data.part_mut(range) }
    }

    /// Several parts at once, to write.
    ///
    /// # Errors
    /// Where two ranges overlap or one goes past the end.
    pub fn views_mut<const N: usize>(&mut self, ranges: [Range<usize>; N]) -> Result<[ViewMut<'_>; N]> {
        Ok(self.data.parts_mut(ranges)?.map(|data| ViewMut { data }))
    }

    /// Lends a part to another thread, until it drops it. Until then whoever reaches for it here panics.
    ///
    /// # Errors
    /// Where the range goes past the end, or some of it is lent.
    pub fn lend(&mut self, range: Range<usize>) -> Result<Lent> {
        self.data.lend(range)
    }

    /// Adds another buffer's elements to these.
    ///
    /// # Errors
    /// Where it has another length.
    pub fn add(&mut self, other: &Buffer) -> Result<()> {
        if self.len() != other.len() {
            bail!("a buffer of {} is to be added to one of {}", other.len(), self.len());
        }
        let (sum, other) = (self.data.all_mut(), other.data.all());
        threads::install(|| {
            let chunks = sum.par_chunks_mut(CHUNK).zip(other.par_chunks(CHUNK));
            chunks.for_each(|(sum, other)| sum.iter_mut().zip(other).for_each(|(sum, x)| *sum += x));
        });
        Ok(())
    }

    /// A copy of a part.
    ///
    /// # Panics
    /// Where the range goes past the end, as indexing a slice does.
    pub fn read(&self, range: Range<usize>) -> Vec<f32> {
        self.data.part(range).to_vec()
    }

    /// Copies `values` in, from element `offset` on.
    ///
    /// # Panics
    /// Where the values go past the end, as indexing a slice does.
    pub fn write(&mut self, offset: usize, values: &[f32]) {
        self.data.part_mut(offset..offset + values.len()).copy_from_slice(values);
    }

    /// Sets every element to `value`.
    pub fn fill(&mut self, value: f32) {
        self.data.all_mut().fill(value);
    }

    pub(crate) fn data(&self) -> &[f32] {
        self.data.all()
    }

    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        self.data.all_mut()
    }
}

impl View<'_> {
    /// How many elements it spans.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether it spans no element.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }
}

impl ViewMut<'_> {
    /// How many elements it spans.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether it spans no element.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_disjoint_and_in_bounds() -> Result<()> {
        let mut buffer = Buffer::from_vec((0..10).map(|i| i as f32).collect(), &Device::Cpu)?;
        let [a, b] = buffer.views_mut([6..8, 0..2])?;
        a.data.copy_from_slice(b.data);
        assert_eq!(buffer.read(5..9), [5., 0., 1., 8.]);
        assert!(buffer.views_mut([0..3, 2..4]).is_err());
        assert!(buffer.views_mut([0..3, 8..11]).is_err());
        Ok(())
    }
}
