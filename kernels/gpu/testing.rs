//! What the tests of launches share: each runs in the emulator, and on a GPU where there is one, in both
//! precisions and between guards.
use super::linear::Blas;
use crate::testing::{all, assert_close, values};
use crate::{Buffer, DType, Device, Result, Tensor};
use candle_core::{CpuStorage, Storage, bail};

/// Elements before and after a tensor that a kernel must not touch.
const GUARD: usize = 64;

/// A device, and what activations are on it.
pub(crate) struct Case<'a, G> {
    pub gpu: &'a G,
    pub device: &'a Device,
    pub dtype: DType,
}

/// The same numbers twice.
pub(crate) struct Operand {
    /// What the kernel is given.
    pub device: Tensor,
    /// What the CPU's kernel is given, in f32.
    pub host: Tensor,
}

/// Runs `test` in both precisions in the emulator, and says where it cannot.
pub(crate) fn emulated(test: impl Fn(Case<'_, super::emulated::Emulator>) -> Result<()>) -> Result<()> {
    let Some(gpu) = super::emulated::Emulator::new() else { return Ok(()) };
    for dtype in [DType::F32, DType::BF16] {
        test(Case { gpu: &gpu, device: &Device::Cpu, dtype })?;
    }
    Ok(())
}

/// Runs `test` in both precisions on the first GPU, and says where there is none.
#[cfg(feature = "cuda")]
pub(crate) fn on_cuda(test: impl Fn(Case<'_, super::cuda::Cuda>) -> Result<()>) -> Result<()> {
    let Some(device) = crate::testing::cuda() else { return Ok(()) };
    let gpu = super::cuda::expect(&device)?;
    for dtype in [DType::F32, DType::BF16] {
        test(Case { gpu: &*gpu, device: &device, dtype })?;
    }
    Ok(())
}

/// `fn $case(case: Case<impl Blas>) -> Result<()>` as a test in the emulator and on a GPU.
macro_rules! gpu_tests {
    ($($case:ident),+) => {
        mod emulated {
            $(#[test]
            fn $case() -> crate::Result<()> {
                crate::gpu::testing::emulated(|case| super::$case(&case))
            })+
        }
        #[cfg(feature = "cuda")]
        mod cuda {
            $(#[test]
            fn $case() -> crate::Result<()> {
                crate::gpu::testing::on_cuda(|case| super::$case(&case))
            })+
        }
    };
}
pub(crate) use gpu_tests;

impl<G: Blas> Case<'_, G> {
    /// The tolerance of this precision.
    pub fn tolerance(&self, f32: f32, bf16: f32) -> f32 {
        if self.dtype == DType::BF16 { bf16 } else { f32 }
    }

    /// `x`, rounded.
    pub fn inputs(&self, x: &Tensor) -> Result<Operand> {
        let rounded = x.to_dtype(self.dtype)?;
        Ok(Operand { device: self.guarded(&rounded)?, host: rounded.to_dtype(DType::F32)? })
    }

    /// A copy on the device, for a kernel to overwrite.
    pub fn copy(&self, x: &Operand) -> Result<Tensor> {
        self.guarded(&x.host.to_dtype(self.dtype)?)
    }

    /// The same on the device.
    pub fn buffer(&self, values: &Buffer) -> Result<Buffer> {
        Buffer::from_vec(all(values), self.device)
    }

    /// The same on the device, with a copy in bf16 where that is computed in.
    pub fn parameters(&self, values: &Buffer) -> Result<Buffer> {
        let mut buffer = self.buffer(values)?;
        if self.dtype == DType::BF16 {
            buffer.keep_bf16()?;
        }
        Ok(buffer)
    }

    /// Fails unless `got` is of this precision, as near to `want` as `tolerance` says, and nothing was
    /// written beside it.
    #[track_caller]
    pub fn close(&self, name: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
        assert_eq!((got.dtype(), got.dims()), (self.dtype, want.dims()), "{name}");
        let name = format!("{name} in {:?}", self.dtype);
        check_guards(&name, got);
        assert_close(&name, &values(&got.to_dtype(DType::F32).unwrap()), &values(want), tolerance);
    }

    /// A copy on the device, between guards.
    fn guarded(&self, x: &Tensor) -> Result<Tensor> {
        let guard = Tensor::full(f32::NAN, GUARD, &Device::Cpu)?.to_dtype(x.dtype())?;
        let all = Tensor::cat(&[&guard, &x.flatten_all()?, &guard], 0)?;
        all.to_device(self.device)?.narrow(0, GUARD, x.elem_count())?.reshape(x.dims())
    }
}

/// What a kernel's output is in the emulator before it is written: NaN, between guards.
pub(crate) fn empty(dims: &[usize], dtype: DType) -> Result<Tensor> {
    match dtype {
        DType::F32 | DType::BF16 | DType::F64 => {
            let n: usize = dims.iter().product();
            let all = Tensor::full(f32::NAN, n + 2 * GUARD, &Device::Cpu)?.to_dtype(dtype)?;
            all.narrow(0, GUARD, n)?.reshape(dims)
        }
        other => bail!("no kernel writes {other:?}"),
    }
}

/// Fails where a tensor has guards and something was written to them.
#[track_caller]
fn check_guards(name: &str, x: &Tensor) {
    let (storage, layout) = x.storage_and_layout();
    let data = match &*storage {
        Storage::Cpu(data) => data.clone(),
        #[cfg(feature = "cuda")]
        Storage::Cuda(data) => candle_core::backend::BackendStorage::to_cpu_storage(data).unwrap(),
        _ => return,
    };
    let data: Vec<f32> = match data {
        CpuStorage::F32(data) => data,
        CpuStorage::BF16(data) => data.iter().map(|x| x.to_f32()).collect(),
        _ => return,
    };
    let n = x.elem_count();
    if data.len() == n + 2 * GUARD && layout.start_offset() == GUARD {
        let guards = data[..GUARD].iter().chain(&data[GUARD + n..]);
        assert!(guards.into_iter().all(|x| x.is_nan()), "{name}: a kernel wrote outside of it");
    }
}
