//! Flat memory on a GPU.
use super::driver;
use crate::lending::{Loan, Loans};
use candle_core::{CudaDevice, Result};
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits};
use std::{mem::ManuallyDrop, ops::Range, sync::Arc};

/// What a [`Buffer`](crate::Buffer) holds on a GPU.
#[derive(Debug)]
pub(crate) struct Slice<T> {
    data: ManuallyDrop<CudaSlice<T>>,
    /// CUDA has no memory of no bytes: then `data` has one element.
    len: usize,
    device: CudaDevice,
    /// Whoever has a part on loan has a clone.
    loans: Arc<Loans>,
}

impl<T> Drop for Slice<T> {
    fn drop(&mut self) {
        // What somebody still has on loan is never freed.
        if Arc::strong_count(&self.loans) == 1 {
            // SAFETY: this is the end of it.
            unsafe { ManuallyDrop::drop(&mut self.data) };
        }
    }
}

/// What is lent of a [`Buffer`](crate::Buffer) on a GPU, for work on another stream.
#[derive(Debug)]
pub struct OnGpu {
    address: u64,
    len: usize,
    ready: CudaEvent,
    stream: Arc<CudaStream>,
    _loan: Loan,
}

impl OnGpu {
    /// Its first element.
    pub fn address(&self) -> u64 {
        self.address
    }
    /// How many `f32` it spans.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether it spans no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// When all that was launched before the loan is done: another stream has to wait for it.
    pub fn ready(&self) -> &CudaEvent {
        &self.ready
    }
    /// The stream that its owner computes on. It does not wait for others: who borrows gives back when
    /// the work is done.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

impl<T: DeviceRepr + ValidAsZeroBits> Slice<T> {
    pub fn zeros(len: usize, device: &CudaDevice) -> Result<Self> {
        let data = device.cuda_stream().alloc_zeros(len.max(1));
        let data = ManuallyDrop::new(driver(data, &says::<T>(len))?);
        Ok(Self { data, len, device: device.clone(), loans: Arc::default() })
    }

    pub fn upload(values: &[T], device: &CudaDevice) -> Result<Self> {
        let mut slice = Self::zeros(values.len(), device)?;
        slice.write(0, values)?;
        Ok(slice)
    }

    /// As many zeros of another type.
    pub fn zeros_like<U: DeviceRepr + ValidAsZeroBits>(&self) -> Result<Slice<U>> {
        Slice::zeros(self.len, &self.device)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Where element `at` is.
    pub fn address(&self, at: usize) -> u64 {
        self.data.device_ptr(self.data.stream()).0 + (at * size_of::<T>()) as u64
    }

    /// Lends a part to another stream.
    pub fn lend(&mut self, range: Range<usize>) -> Result<OnGpu> {
        let loan = self.loans.lend(range.clone(), self.len)?;
        let stream = self.device.cuda_stream();
        let ready = driver(stream.record_event(None), "lending a buffer")?;
        let address = self.address(range.start);
        Ok(OnGpu { address, len: range.len(), ready, stream, _loan: loan })
    }

    pub fn write(&mut self, offset: usize, values: &[T]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let mut part = self.data.slice_mut(offset..offset + values.len());
        driver(self.device.cuda_stream().memcpy_htod(values, &mut part), "copying to the device")
    }

    /// Waits for all work before it.
    pub fn download(&self, range: Range<usize>) -> Result<Vec<T>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let stream = self.device.cuda_stream();
        let values = driver(stream.clone_dtoh(&self.data.slice(range)), "copying from the device")?;
        driver(stream.synchronize(), "copying from the device")?;
        Ok(values)
    }
}

fn says<T>(len: usize) -> String {
    format!("{} MB for parameters, gradients or moments", len * size_of::<T>() / 1_000_000)
}
