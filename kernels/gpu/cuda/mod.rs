//! A real GPU: candle's device on one stream, with kiln's kernels compiled for it.
//!
//! All work goes to that stream in the order of the calls, and memory is freed in that order too: an
//! operand may be dropped as soon as its kernel was launched.
mod blas;
mod compile;
mod slice;

pub use slice::OnGpu;
pub(crate) use slice::Slice;

use super::{Arg, Gpu, Launch, Module};
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor,
    backend::BackendDevice,
    bail,
    cuda_backend::{CudaStorageSlice, DeviceId},
};
use cudarc::driver::{CudaFunction, DevicePtr, DriverError, result, sys};
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, RwLock},
};

/// A GPU that [`device`] made.
pub(crate) struct Cuda {
    device: CudaDevice,
    functions: Mutex<HashMap<(&'static str, String), Function>>,
    blas: blas::Library,
}

struct Function {
    function: CudaFunction,
    /// The most dynamic shared memory that it was asked with.
    shared_bytes: u32,
}

/// Those that were made; candle's device says which one a tensor is on.
static MADE: RwLock<Vec<(DeviceId, Arc<Cuda>)>> = RwLock::new(Vec::new());

/// Where compiled kernels are kept.
static CACHE: Mutex<Option<PathBuf>> = Mutex::new(None);

pub(crate) fn set_cache(folder: PathBuf) {
    *lock(&CACHE) = Some(folder);
}

/// Dynamic shared memory that a kernel has without asking.
const SHARED_BYTES: u32 = 48 << 10;

/// The oldest architecture that kernels are for.
const OLDEST: (i32, i32) = (8, 0);

/// How many GPUs there are.
pub(crate) fn count() -> Result<usize> {
    let count = result::init().and_then(|()| result::device::get_count());
    driver(count, "looking for GPUs").map(|count| count as usize)
}

/// Opens GPU `ordinal`, on one stream.
pub(crate) fn device(ordinal: usize) -> Result<Device> {
    let count = count()?;
    if ordinal >= count {
        bail!("CUDA device {ordinal} was asked for, but there are {count}");
    }
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: there is one stream, on which everything is in order.
    unsafe { device.disable_event_tracking() };
    let stream = device.cuda_stream();
    let context = stream.context();
    let architecture = driver(context.compute_capability(), "asking for its architecture")?;
    if architecture < OLDEST {
        let ((major, minor), (oldest_major, oldest_minor)) = (architecture, OLDEST);
        bail!("CUDA device {ordinal} is of sm_{major}{minor}: kernels need sm_{oldest_major}{oldest_minor} or later");
    }
    keep_freed_memory(context.cu_device())?;
    let blas = blas::Library::new(&device)?;
    let cuda = Cuda { device: device.clone(), functions: Mutex::default(), blas };
    MADE.write().unwrap_or_else(|poisoned| poisoned.into_inner()).push((device.id(), Arc::new(cuda)));
    Ok(Device::Cuda(device))
}

/// Free bytes, those that the pool keeps included, and all.
pub(crate) fn memory(device: &Device) -> Result<(u64, u64)> {
    let cuda = expect(device)?;
    let stream = cuda.device.cuda_stream();
    let context = stream.context();
    driver(stream.synchronize().and_then(|()| context.bind_to_thread()), "asking for its memory")?;
    let [mut reserved, mut used] = [0u64; 2];
    // SAFETY: the device exists, and the attributes are u64s.
    let asked = unsafe {
        result::device::get_default_mem_pool(context.cu_device()).and_then(|pool| {
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
            sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut reserved).cast()).result()?;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
            sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut used).cast()).result()?;
            result::mem_get_info()
        })
    };
    let (free, total) = driver(asked, "asking for its memory")?;
    Ok((free as u64 + reserved.saturating_sub(used), total as u64))
}

/// What is freed stays in the pool: by default the driver gives it back at every synchronisation, and the
/// next step would ask for it again.
fn keep_freed_memory(device: sys::CUdevice) -> Result<()> {
    let mut all = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device exists, and the attribute is a u64.
    let set = unsafe {
        result::device::get_default_mem_pool(device)
            .and_then(|pool| sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut all).cast()).result())
    };
    driver(set, "keeping its memory pool")
}

/// The GPU of a device; nothing where that is the CPU.
///
/// # Errors
/// A device that [`device`] did not make: it may have other streams.
pub(crate) fn of(device: &Device) -> Result<Option<Arc<Cuda>>> {
    match device {
        Device::Cuda(_) => expect(device).map(Some),
        _ => Ok(None),
    }
}

/// The GPU of a device.
///
/// # Errors
/// A device that [`device`] did not make.
pub(crate) fn expect(device: &Device) -> Result<Arc<Cuda>> {
    if let Device::Cuda(cuda) = device {
        let made = MADE.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, cuda)) = made.iter().find(|(id, _)| *id == cuda.id()) {
            return Ok(cuda.clone());
        }
    }
    bail!("kernels run on the CPU and on what kiln_kernels::cuda_device opened, not on {device:?}")
}

/// Whether products of f32 may round their factors to TF32.
pub(crate) fn allow_tf32(device: &Device, allow: bool) -> Result<()> {
    expect(device)?.blas.allow_tf32(allow);
    Ok(())
}

impl Gpu for Cuda {
    fn launch(&self, module: &Module, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        let what = || format!("{}::{kernel}", module.name);
        let mut functions = lock(&self.functions);
        let key = (module.name, kernel.to_owned());
        if !functions.contains_key(&key) {
            let function = self.load(module, kernel)?;
            functions.insert(key.clone(), Function { function, shared_bytes: SHARED_BYTES });
        }
        let Some(Function { function, shared_bytes }) = functions.get_mut(&key) else {
            bail!("{}: it was loaded and is not there", what());
        };
        if launch.shared_bytes > *shared_bytes {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            driver(function.set_attribute(most, launch.shared_bytes as i32), &what())?;
            *shared_bytes = launch.shared_bytes;
        }
        let stream = self.device.cuda_stream();
        let mut builder = stream.launch_builder(function);
        for arg in args {
            use cudarc::driver::PushKernelArg;
            match arg {
                Arg::Pointer(x) | Arg::U64(x) => builder.arg(x),
                Arg::I32(x) => builder.arg(x),
                Arg::U32(x) => builder.arg(x),
                Arg::F32(x) => builder.arg(x),
            };
        }
        let Launch { grid: [x, y, z], block: [bx, by, bz], shared_bytes } = launch;
        let config = cudarc::driver::LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (bx, by, bz),
            shared_mem_bytes: shared_bytes,
        };
        // SAFETY: arguments are the kernel's, as the emulator's tests of the same launches check.
        driver(unsafe { builder.launch(config) }, &what()).map(|_| ())
    }
}

impl Cuda {
    fn load(&self, module: &Module, kernel: &str) -> Result<CudaFunction> {
        // candle keeps modules by name, but only from PTX: a cubin needs no compiler in the driver.
        let stream = self.device.cuda_stream();
        let context = stream.context();
        let architecture = driver(context.compute_capability(), "asking for its architecture")?;
        let cache = lock(&CACHE).clone().unwrap_or_else(|| std::env::temp_dir().join("kiln-kernels"));
        let loaded = compile::module(module, architecture, &cache, |cubin| {
            context.load_module(cudarc::nvrtc::Ptx::from_binary(cubin)).map_err(|e| e.to_string())
        })?;
        driver(loaded.load_function(kernel), &format!("{}::{kernel}", module.name))
    }
}

/// A tensor's storage on a GPU, where kernels take its dtype.
pub(super) fn address(storage: &CudaStorage) -> Option<u64> {
    fn first<T>(slice: &cudarc::driver::CudaSlice<T>) -> u64 {
        slice.device_ptr(slice.stream()).0
    }
    match &storage.slice {
        CudaStorageSlice::F32(slice) => Some(first(slice)),
        CudaStorageSlice::F64(slice) => Some(first(slice)),
        CudaStorageSlice::BF16(slice) => Some(first(slice)),
        CudaStorageSlice::U32(slice) => Some(first(slice)),
        CudaStorageSlice::I64(slice) => Some(first(slice)),
        _ => None,
    }
}

/// A tensor that nobody has written yet.
pub(super) fn empty(dims: &[usize], dtype: DType, device: &CudaDevice) -> Result<Tensor> {
    let shape = Shape::from(dims);
    // SAFETY: whoever asks has a kernel write all of it.
    let storage = unsafe { device.alloc_uninit(&shape, dtype) }?;
    Ok(Tensor::from((Storage::Cuda(storage), shape)))
}

fn driver<T>(result: std::result::Result<T, DriverError>, what: &str) -> Result<T> {
    result.map_err(|e| candle_core::Error::Msg(format!("CUDA, {what}: {e}")))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
