//! Flat memory on a GPU.
use super::driver;
use candle_core::{CudaDevice, Result};
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, ValidAsZeroBits};
use std::ops::Range;

/// What a [`Buffer`](crate::Buffer) holds on a GPU.
#[derive(Debug)]
pub(crate) struct Slice<T> {
    data: CudaSlice<T>,
    /// CUDA has no memory of no bytes: then `data` has one element.
    len: usize,
    device: CudaDevice,
}

impl<T: DeviceRepr + ValidAsZeroBits> Slice<T> {
    pub fn zeros(len: usize, device: &CudaDevice) -> Result<Self> {
        let data = device.cuda_stream().alloc_zeros(len.max(1));
        Ok(Self { data: driver(data, &says::<T>(len))?, len, device: device.clone() })
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
