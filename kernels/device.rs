//! The device that kernels run on.
use candle_core::{Device, Result};
use std::path::PathBuf;

/// Opens CUDA device `ordinal` for kernels: one stream, on which all work is in the order of the calls,
/// no events, and a memory pool that keeps what is freed.
///
/// # Errors
/// Where this build is without the feature `cuda`, there is no such device, or it is older than sm_80.
pub fn cuda_device(ordinal: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return crate::gpu::cuda::device(ordinal);
    #[cfg(not(feature = "cuda"))]
    candle_core::bail!("CUDA device {ordinal} was asked for, but this build is without the feature `cuda`")
}

/// How many GPUs there are for [`cuda_device`]: none where this build is without the feature `cuda`, or the
/// machine without a driver.
pub fn cuda_devices() -> usize {
    #[cfg(feature = "cuda")]
    return crate::gpu::cuda::count().unwrap_or(0);
    #[cfg(not(feature = "cuda"))]
    0
}

/// Bytes of memory of a GPU that [`cuda_device`] opened: free ones, those that its pool keeps included, and
/// all.
///
/// # Errors
/// Where it did not open the device.
pub fn cuda_memory(device: &Device) -> Result<(u64, u64)> {
    #[cfg(feature = "cuda")]
    return crate::gpu::cuda::memory(device);
    #[cfg(not(feature = "cuda"))]
    candle_core::bail!("the memory of {device:?} was asked for, but this build is without the feature `cuda`")
}

/// Keeps the kernels that are compiled for a GPU in `folder` from now on; until then it is
/// `kiln-kernels` in the system's folder of temporary files.
pub fn set_kernel_cache(folder: PathBuf) {
    #[cfg(feature = "cuda")]
    crate::gpu::cuda::set_cache(folder);
    #[cfg(not(feature = "cuda"))]
    drop(folder); // nothing is compiled
}

/// Whether products of `f32` activations on a device that [`cuda_device`] opened may round their factors
/// to TF32, which has bf16's range and three more bits: some 8 times as fast, with relative errors of
/// some 1e-3 in place of 1e-7. They may not until this is called.
///
/// # Errors
/// Where [`cuda_device`] did not open the device.
pub fn allow_tf32(device: &Device, allow: bool) -> Result<()> {
    #[cfg(feature = "cuda")]
    return crate::gpu::cuda::allow_tf32(device, allow);
    #[cfg(not(feature = "cuda"))]
    candle_core::bail!("TF32 = {allow} on {device:?}: this build is without the feature `cuda`")
}

/// Returns what `$compute` says where `$device` is a GPU.
macro_rules! on_gpu {
    ($device:expr, |$gpu:ident| $compute:expr) => {
        #[cfg(feature = "cuda")]
        if let Some($gpu) = crate::gpu::cuda::of($device)? {
            return $compute;
        }
    };
}
pub(crate) use on_gpu;
