//! Tensors, parameters and packings as kernels take them: addresses that were checked.
use super::Arg;
use crate::{Dropout, Packing, View, ViewMut};
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};

/// What a kernel needs to know of its operands: all are on one device and contiguous, and activations
/// share a dtype.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    kernel: &'static str,
    device: &'a Device,
    dtype: DType,
}

/// How many elements a GPU reads and writes at once, in bytes.
const VECTOR: u64 = 16;

impl<'a> Operands<'a> {
    /// Those of a kernel whose first one is the activation `x`.
    ///
    /// # Errors
    /// Where its elements are neither F32 nor BF16.
    pub fn like(kernel: &'static str, name: &str, x: &'a Tensor) -> Result<Self> {
        Self::new(kernel, x.device(), x.dtype())
            .map_err(|_| candle_core::Error::Msg(format!("{kernel}: {name} is {:?}: needs F32 or BF16", x.dtype())))
    }

    /// Those of a kernel on activations of this dtype.
    ///
    /// # Errors
    /// Where it is neither F32 nor BF16.
    pub fn new(kernel: &'static str, device: &'a Device, dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 | DType::BF16 => Ok(Self { kernel, device, dtype }),
            other => bail!("{kernel}: activations are {other:?}: needs F32 or BF16"),
        }
    }

    /// The kernel of this name for the activations' dtype.
    pub fn entry(&self, name: &str) -> String {
        format!("{name}_{}", if self.dtype == DType::BF16 { "bf16" } else { "f32" })
    }

    /// How many elements a vector has.
    pub fn vector(&self) -> usize {
        VECTOR as usize / self.dtype.size_in_bytes()
    }

    /// An activation.
    ///
    /// # Errors
    /// Where it is on another device, of another dtype or not contiguous.
    pub fn activation(&self, name: &str, tensor: &Tensor) -> Result<Arg> {
        self.tensor(name, tensor, self.dtype)
    }

    /// An activation, or null.
    ///
    /// # Errors
    /// As [`activation`](Self::activation).
    pub fn optional(&self, name: &str, tensor: Option<&Tensor>) -> Result<Arg> {
        tensor.map_or(Ok(Arg::Pointer(0)), |tensor| self.activation(name, tensor))
    }

    /// A tensor of any dtype.
    ///
    /// # Errors
    /// Where it is on another device, of another dtype or not contiguous.
    pub fn tensor(&self, name: &str, tensor: &Tensor, dtype: DType) -> Result<Arg> {
        let kernel = self.kernel;
        if !tensor.device().same_device(self.device) {
            bail!("{kernel}: {name} is on {:?}: needs {:?}, as the others are", tensor.device(), self.device);
        }
        if tensor.dtype() != dtype {
            bail!("{kernel}: {name} is {:?}: needs {dtype:?}", tensor.dtype());
        }
        if !tensor.is_contiguous() {
            let (dims, stride) = (tensor.dims(), tensor.stride());
            bail!("{kernel}: {name} has shape {dims:?} with strides {stride:?}: needs to be contiguous");
        }
        match address(tensor) {
            Some(address) => Ok(Arg::Pointer(address)),
            None => bail!("{kernel}: {name} is {dtype:?}, which no kernel takes"),
        }
    }

    /// A parameter in f32, as norms and biases are read.
    ///
    /// # Errors
    /// Where it is on another device.
    pub fn parameter(&self, name: &str, view: View) -> Result<Arg> {
        self.same_device(name, view.device())?;
        Ok(Arg::Pointer(view.address()))
    }

    /// A parameter in the activations' dtype, as products read it.
    ///
    /// # Errors
    /// Where it is on another device, or has no copy in BF16 where that is needed.
    pub fn weight(&self, name: &str, view: View) -> Result<Arg> {
        if self.dtype == DType::F32 {
            return self.parameter(name, view);
        }
        self.same_device(name, view.device())?;
        match view.bf16_address() {
            Some(address) => Ok(Arg::Pointer(address)),
            None => bail!("{}: {name} has no copy in BF16, which activations are: see Buffer::keep_bf16", self.kernel),
        }
    }

    /// A parameter's gradient, or null.
    ///
    /// # Errors
    /// Where it is on another device.
    pub fn gradient(&self, name: &str, view: Option<&mut ViewMut>) -> Result<Arg> {
        let Some(view) = view else { return Ok(Arg::Pointer(0)) };
        self.same_device(name, view.device())?;
        Ok(Arg::Pointer(view.address()))
    }

    fn same_device(&self, name: &str, device: &Device) -> Result<()> {
        if !device.same_device(self.device) {
            bail!("{}: {name} is on {device:?}: needs {:?}, as the activations are", self.kernel, self.device);
        }
        Ok(())
    }

    /// An activation that nobody has written yet.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn empty(&self, dims: &[usize]) -> Result<Tensor> {
        empty(dims, self.dtype, self.device)
    }

    /// The same of another dtype.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn empty_of(&self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        empty(dims, dtype, self.device)
    }

    /// Copies whole numbers to the device.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn upload(&self, values: &[u32]) -> Result<Tensor> {
        Tensor::from_slice(values, values.len(), self.device)
    }

    /// `tensor` to be overwritten: a copy where `reading` shares its storage.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn own(&self, tensor: Tensor, reading: &[&Tensor]) -> Result<Tensor> {
        let storage = |tensor: &Tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0);
        let shared = reading.iter().any(|other| std::ptr::eq(storage(&tensor), storage(other)));
        if shared { tensor.copy() } else { Ok(tensor) }
    }

    /// What [`RowMask`](elements.cuh) takes: three arrays of the packing, and dropout's four arguments.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn dropout(&self, dropout: Option<(&Dropout, &Packing)>) -> Result<[Arg; 7]> {
        let [key, site, threshold, scale] = super::dropout_args(dropout.map(|(dropout, _)| dropout));
        let [ids, sequences, offsets] = match dropout {
            Some((_, packing)) => {
                let packing = packing.on(self.device)?;
                let pointer = |tensor: &Tensor| address(tensor).map(Arg::Pointer).unwrap_or(Arg::Pointer(0));
                [pointer(&packing.example_ids), pointer(&packing.sequences), pointer(&packing.offsets)]
            }
            None => [Arg::Pointer(0); 3],
        };
        Ok([ids, sequences, offsets, key, site, threshold, scale])
    }
}

/// Whether all operands are null or begin at a multiple of 16 bytes, and rows of `columns` elements
/// keep it so: then kernels take vectors.
pub(crate) fn vectors(operands: &[Arg], columns: usize, vector: usize) -> Arg {
    let aligned = operands.iter().all(|arg| !matches!(arg, Arg::Pointer(address) if address % VECTOR != 0));
    Arg::U32((aligned && columns.is_multiple_of(vector)) as u32)
}

/// A tensor's first element, where it is of a dtype that kernels take.
fn address(tensor: &Tensor) -> Option<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let base = match &*storage {
        Storage::Cpu(CpuStorage::F32(data)) => data.as_ptr() as u64,
        Storage::Cpu(CpuStorage::F64(data)) => data.as_ptr() as u64,
        Storage::Cpu(CpuStorage::BF16(data)) => data.as_ptr() as u64,
        Storage::Cpu(CpuStorage::U32(data)) => data.as_ptr() as u64,
        Storage::Cpu(CpuStorage::I64(data)) => data.as_ptr() as u64,
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => super::cuda::address(storage)?,
        _ => return None,
    };
    Some(base + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

fn empty(dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::cuda::empty(dims, dtype, device),
        #[cfg(test)]
        Device::Cpu => super::testing::empty(dims, dtype),
        other => bail!("kernels do not run on {other:?}"),
    }
}
