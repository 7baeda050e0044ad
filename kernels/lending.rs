//! The host's memory behind a [`Buffer`](crate::Buffer), of which parts can be lent.
use candle_core::{Result, bail};
use std::{
    ops::{Deref, DerefMut, Range},
    ptr::NonNull,
    slice,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A flat array whose parts can be lent to another thread, each by itself. Whoever has the whole
/// sees what is not lent.
#[derive(Debug)]
pub(crate) struct Lendable {
    shared: Arc<Shared>,
}

/// A part of a [`Buffer`](crate::Buffer) that is out of its owner's reach until it is dropped.
#[derive(Debug)]
pub enum Lent {
    /// On the CPU.
    Host(OnHost),
    /// On a GPU.
    #[cfg(feature = "cuda")]
    Cuda(crate::gpu::cuda::OnGpu),
}

/// What is lent of a buffer on the CPU: a slice.
#[derive(Debug)]
pub struct OnHost {
    shared: Arc<Shared>,
    loan: Loan,
}

#[derive(Debug)]
struct Shared {
    start: NonNull<f32>,
    len: usize,
    loans: Arc<Loans>,
}

/// Which parts of a buffer are lent.
#[derive(Debug, Default)]
pub(crate) struct Loans(Mutex<Vec<Range<usize>>>);

/// One of them, until this is dropped.
#[derive(Debug)]
pub(crate) struct Loan {
    loans: Arc<Loans>,
    range: Range<usize>,
}

impl Loans {
    /// Lends a part of a buffer of `len`.
    ///
    /// # Errors
    /// Where it goes past the end, or some of it is lent.
    pub fn lend(self: &Arc<Self>, range: Range<usize>, len: usize) -> Result<Loan> {
        let mut lent = self.lent();
        if range.start > range.end || range.end > len || lent.iter().any(|other| overlap(other, &range)) {
            bail!("{range:?} of a buffer of {len} cannot be lent: lent are {lent:?}");
        }
        lent.push(range.clone());
        Ok(Loan { loans: self.clone(), range })
    }

    fn lent(&self) -> MutexGuard<'_, Vec<Range<usize>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let mut lent = self.loans.lent();
        if let Some(i) = lent.iter().position(|range| *range == self.range) {
            lent.swap_remove(i);
        }
    }
}

// SAFETY: it owns plain numbers, and only `Lendable` and `OnHost` reach them, each its own part.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        let slice = std::ptr::slice_from_raw_parts_mut(self.start.as_ptr(), self.len);
        // SAFETY: it was a box of this many elements, and nobody else is left.
        drop(unsafe { Box::from_raw(slice) });
    }
}

impl From<Vec<f32>> for Lendable {
    fn from(data: Vec<f32>) -> Self {
        let data = Box::leak(data.into_boxed_slice());
        Self { shared: Arc::new(Shared { len: data.len(), start: NonNull::from(data).cast(), loans: Arc::default() }) }
    }
}

impl Default for Lendable {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl Lendable {
    pub fn len(&self) -> usize {
        self.shared.len
    }

    /// The whole.
    ///
    /// # Panics
    /// Where a part of it is lent.
    pub fn all(&self) -> &[f32] {
        self.part(0..self.len())
    }

    /// As [`all`](Self::all), to write.
    pub fn all_mut(&mut self) -> &mut [f32] {
        self.part_mut(0..self.len())
    }

    /// A part.
    ///
    /// # Panics
    /// Where it goes past the end, or some of it is lent.
    pub fn part(&self, range: Range<usize>) -> &[f32] {
        let at = self.at(&range);
        // SAFETY: in bounds and not lent; `&self` lets nobody write to what is not.
        unsafe { slice::from_raw_parts(at, range.len()) }
    }

    /// As [`part`](Self::part), to write.
    pub fn part_mut(&mut self, range: Range<usize>) -> &mut [f32] {
        let at = self.at(&range);
        // SAFETY: in bounds and not lent; `&mut self` lets nobody else reach what is not.
        unsafe { slice::from_raw_parts_mut(at, range.len()) }
    }

    /// Several parts at once, to write.
    ///
    /// # Errors
    /// Where two overlap, or one goes past the end.
    ///
    /// # Panics
    /// Where some of them is lent.
    pub fn parts_mut<const N: usize>(&mut self, ranges: [Range<usize>; N]) -> Result<[&mut [f32]; N]> {
        for (i, range) in ranges.iter().enumerate() {
            if range.start > range.end || range.end > self.len() || ranges[..i].iter().any(|r| overlap(r, range)) {
                bail!("views {ranges:?} of a buffer of {}: they overlap, or go past its end", self.len());
            }
        }
        // SAFETY: as in `part_mut`, and they are apart.
        Ok(ranges.map(|range| unsafe { slice::from_raw_parts_mut(self.at(&range), range.len()) }))
    }

    /// Lends a part.
    ///
    /// # Errors
    /// Where it goes past the end, or some of it is lent.
    pub fn lend(&mut self, range: Range<usize>) -> Result<OnHost> {
        let loan = self.shared.loans.lend(range, self.len())?;
        Ok(OnHost { shared: self.shared.clone(), loan })
    }

    fn at(&self, range: &Range<usize>) -> *mut f32 {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of a buffer of {}", self.len());
        let lent = self.shared.loans.lent();
        assert!(!lent.iter().any(|other| overlap(other, range)), "{range:?} of a buffer: lent are {lent:?}");
        // SAFETY: in bounds.
        unsafe { self.shared.start.as_ptr().add(range.start) }
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Deref for OnHost {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: in bounds since it was lent, and its owner does not reach it until this is dropped.
        unsafe { slice::from_raw_parts(self.shared.start.as_ptr().add(self.loan.range.start), self.loan.range.len()) }
    }
}

impl DerefMut for OnHost {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and this is borrowed alone.
        unsafe {
            slice::from_raw_parts_mut(self.shared.start.as_ptr().add(self.loan.range.start), self.loan.range.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lent_is_written_by_another_thread_while_the_rest_goes_on() {
        let mut memory = Lendable::from(vec![1.0; 1000]);
        let mut lent = memory.lend(100..600).unwrap();
        assert!(memory.lend(599..700).is_err() && memory.lend(900..1001).is_err());
        let other = std::thread::spawn(move || {
            lent.iter_mut().for_each(|x| *x += 1.0);
            lent
        });
        memory.part_mut(600..1000).fill(3.0);
        memory.part_mut(0..100).fill(4.0);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| memory.part(500..700).len())).is_err());
        drop(other.join().unwrap());
        let sum: f32 = memory.all().iter().sum();
        assert_eq!(sum, 100.0 * 4.0 + 500.0 * 2.0 + 400.0 * 3.0);
    }

    #[test]
    fn what_is_lent_outlives_its_owner() {
        let mut memory = Lendable::from(vec![7.0; 4]);
        let lent = memory.lend(1..3).unwrap();
        drop(memory);
        assert_eq!(*lent, [7.0, 7.0]);
    }
}
