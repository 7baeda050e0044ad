//! Where each sequence of a packed batch begins and ends.
#[cfg(any(test, feature = "cuda"))]
use candle_core::{Device, Tensor};
use candle_core::{Result, bail};
use std::{ops::Range, sync::Arc};

/// The boundaries of sequences that lie one after another in a `[tokens, …]` tensor, and which
/// example each one is. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Packing(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    offsets: Vec<u32>,
    example_ids: Vec<u64>,
    max_length: usize,
    /// Made once a batch: all its kernels read it.
    #[cfg(any(test, feature = "cuda"))]
    on_device: std::sync::Mutex<Option<Arc<OnDevice>>>,
}

/// A packing where a GPU's kernels read it.
#[cfg(any(test, feature = "cuda"))]
#[derive(Debug)]
pub(crate) struct OnDevice {
    /// `[sequences + 1]`, u32.
    pub offsets: Tensor,
    /// `[sequences]`, the bits of u64.
    pub example_ids: Tensor,
    /// Each row's sequence, `[tokens]`, u32.
    pub sequences: Tensor,
    /// Attention's blocks.
    pub tiles: std::sync::Mutex<crate::gpu::attention::TilesBySize>,
}

/// Neighbouring rows of one sequence.
pub(crate) struct Segment {
    pub rows: Range<usize>,
    pub example_id: u64,
    /// The first row's place in its sequence.
    pub position: usize,
}

impl Packing {
    /// Sequence `i` takes the rows `offsets[i]..offsets[i + 1]` and is example `example_ids[i]` of
    /// the data set.
    ///
    /// # Errors
    /// Where offsets do not start at 0 and rise, or are not one more than the examples.
    pub fn new(offsets: Vec<u32>, example_ids: Vec<u64>) -> Result<Self> {
        if offsets.len() != example_ids.len() + 1 || example_ids.is_empty() {
            bail!(
                "packing: {} offsets for {} examples: needs one example or more, and one offset more than examples",
                offsets.len(),
                example_ids.len()
            );
        }
        if offsets[0] != 0 {
            bail!("packing: offsets start at {}: needs 0", offsets[0]);
        }
        let mut max_length = 0;
        for (i, pair) in offsets.windows(2).enumerate() {
            if pair[1] <= pair[0] {
                bail!("packing: sequence {i} goes from row {} to row {}: needs one row or more", pair[0], pair[1]);
            }
            max_length = max_length.max((pair[1] - pair[0]) as usize);
        }
        Ok(Self::of(offsets, example_ids, max_length))
    }

    fn of(offsets: Vec<u32>, example_ids: Vec<u64>, max_length: usize) -> Self {
        #[cfg(any(test, feature = "cuda"))]
        let inner = Inner { offsets, example_ids, max_length, on_device: Default::default() };
        #[cfg(not(any(test, feature = "cuda")))]
        let inner = Inner { offsets, example_ids, max_length };
        Self(Arc::new(inner))
    }

    /// The packing on a device: copied there at the first call.
    ///
    /// # Errors
    /// Memory that the device does not have.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn on(&self, device: &Device) -> Result<Arc<OnDevice>> {
        let mut made = self.0.on_device.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(on_device) = made.as_ref().filter(|made| made.offsets.device().same_device(device)) {
            return Ok(on_device.clone());
        }
        let spans = self.0.offsets.windows(2).zip(0u32..);
        let sequences: Vec<u32> = spans.flat_map(|(span, i)| (span[0]..span[1]).map(move |_| i)).collect();
        let example_ids = self.0.example_ids.iter().map(|&id| id as i64).collect();
        let on_device = Arc::new(OnDevice {
            offsets: Tensor::from_slice(&self.0.offsets, self.0.offsets.len(), device)?,
            example_ids: Tensor::from_vec(example_ids, self.sequences(), device)?,
            sequences: Tensor::from_vec(sequences, self.tokens(), device)?,
            tiles: Default::default(),
        });
        *made = Some(on_device.clone());
        Ok(on_device)
    }

    /// How many sequences there are.
    pub fn sequences(&self) -> usize {
        self.0.example_ids.len()
    }

    /// How many rows all sequences have together.
    pub fn tokens(&self) -> usize {
        self.0.offsets[self.sequences()] as usize
    }

    /// Each sequence's first row, and after the last sequence the number of rows.
    pub fn offsets(&self) -> &[u32] {
        &self.0.offsets
    }

    /// Which example each sequence is.
    pub fn example_ids(&self) -> &[u64] {
        &self.0.example_ids
    }

    /// The longest sequence's length.
    pub fn max_length(&self) -> usize {
        self.0.max_length
    }

    /// The same examples with one row each, as [`pooling`](crate::pooling) makes them.
    pub fn firsts(&self) -> Packing {
        Self::of((0..=self.sequences() as u32).collect(), self.0.example_ids.clone(), 1)
    }

    /// The rows of sequence `i`.
    pub(crate) fn rows(&self, i: usize) -> Range<usize> {
        self.0.offsets[i] as usize..self.0.offsets[i + 1] as usize
    }

    /// `rows`, cut where sequences end.
    pub(crate) fn segments(&self, rows: Range<usize>) -> impl Iterator<Item = Segment> + '_ {
        let first = self.0.offsets.partition_point(|&o| o as usize <= rows.start) - 1;
        (first..self.sequences()).map_while(move |i| {
            let sequence = self.rows(i);
            let start = sequence.start.max(rows.start);
            let end = sequence.end.min(rows.end);
            (start < end).then(|| Segment {
                rows: start..end,
                example_id: self.0.example_ids[i],
                position: start - sequence.start,
            })
        })
    }

    pub(crate) fn check(&self, kernel: &str, rows: usize) -> Result<()> {
        if self.tokens() != rows {
            bail!("{kernel}: the packing has {} rows, the tensor {rows}", self.tokens());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_a_packing() {
        for (offsets, ids) in [
            (vec![0], vec![]),
            (vec![1, 2], vec![7]),
            (vec![0, 2, 2], vec![7, 8]),
            (vec![0, 2, 1], vec![7, 8]),
            (vec![0, 2], vec![7, 8]),
        ] {
            assert!(Packing::new(offsets.clone(), ids).is_err(), "{offsets:?}");
        }
    }

    #[test]
    fn segments_are_cut_where_sequences_end() -> Result<()> {
        let packing = Packing::new(vec![0, 1, 4, 9], vec![70, 80, 90])?;
        let cut = |rows| -> Vec<_> { packing.segments(rows).map(|s| (s.rows, s.example_id, s.position)).collect() };
        assert_eq!(cut(0..9), [(0..1, 70, 0), (1..4, 80, 0), (4..9, 90, 0)]);
        assert_eq!(cut(2..6), [(2..4, 80, 1), (4..6, 90, 0)]);
        assert_eq!(cut(6..7), [(6..7, 90, 2)]);
        assert_eq!((packing.tokens(), packing.max_length()), (9, 5));
        assert_eq!(packing.firsts().offsets(), [0, 1, 2, 3]);
        Ok(())
    }
}
