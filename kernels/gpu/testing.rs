//! What the tests of launches share: inputs in both precisions, and device memory with guards.
use crate::testing::{assert_close, values};
use candle_core::{DType, Device, Result, Tensor, bail};

/// Elements before and after a tensor that a kernel must not touch.
const GUARD: usize = 64;

/// What activations are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Precision {
    F32,
    Bf16,
}

pub(crate) const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// The same numbers twice.
pub(crate) struct Operand {
    /// What the kernel is given.
    pub device: Tensor,
    /// What the CPU's kernel is given, in f32.
    pub host: Tensor,
}

impl Operand {
    /// A copy for the kernel to overwrite, between guards.
    pub fn copy(&self) -> Result<Tensor> {
        guarded(&self.device)
    }
}

impl Precision {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// The tolerance of this precision.
    pub fn tolerance(self, f32: f32, bf16: f32) -> f32 {
        match self {
            Self::F32 => f32,
            Self::Bf16 => bf16,
        }
    }

    /// `x`, rounded.
    pub fn inputs(self, x: &Tensor) -> Operand {
        let rounded = x.to_dtype(self.dtype()).unwrap();
        Operand { device: guarded(&rounded).unwrap(), host: rounded.to_dtype(DType::F32).unwrap() }
    }

    /// Parameters, with a copy in bf16 where that is computed in.
    pub fn parameters(self, mut buffer: crate::Buffer) -> crate::Buffer {
        if self == Self::Bf16 {
            buffer.keep_bf16().unwrap();
        }
        buffer
    }

    /// Fails unless `got` is of this precision, as near to `want` as `tolerance` says, and nothing was
    /// written beside it.
    #[track_caller]
    pub fn close(self, name: &str, got: &Tensor, want: &Tensor, tolerance: f32) {
        assert_eq!((got.dtype(), got.dims()), (self.dtype(), want.dims()), "{name}");
        let name = format!("{name} in {self:?}");
        check_guards(&name, got);
        assert_close(&name, &values(&got.to_dtype(DType::F32).unwrap()), &values(want), tolerance);
    }
}

/// A copy between guards.
fn guarded(x: &Tensor) -> Result<Tensor> {
    let n = x.elem_count();
    let guard = Tensor::full(f32::NAN, GUARD, &Device::Cpu)?.to_dtype(x.dtype())?;
    let all = Tensor::cat(&[&guard, &x.flatten_all()?, &guard], 0)?;
    all.narrow(0, GUARD, n)?.reshape(x.dims())
}

/// What a kernel's output is before it is written: NaN, between guards.
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

#[track_caller]
fn check_guards(name: &str, x: &Tensor) {
    let (start, n) = (x.storage_and_layout().1.start_offset(), x.elem_count());
    let (storage, _) = x.storage_and_layout();
    let all: Vec<f32> = match &*storage {
        candle_core::Storage::Cpu(candle_core::CpuStorage::F32(data)) => data.clone(),
        candle_core::Storage::Cpu(candle_core::CpuStorage::BF16(data)) => data.iter().map(|x| x.to_f32()).collect(),
        _ => return,
    };
    if all.len() == n + 2 * GUARD && start == GUARD {
        let guards = all[..GUARD].iter().chain(&all[GUARD + n..]);
        assert!(guards.into_iter().all(|x| x.is_nan()), "{name}: a kernel wrote outside of it");
    }
}
