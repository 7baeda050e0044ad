//! The way into candle's CPU tensors: slices to read, slices to overwrite, fresh memory to fill.
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use std::{cell::Cell, mem::MaybeUninit, ops::Deref};

/// A tensor's elements, with its storage locked for reading.
struct Elements<G> {
    guard: G,
    start: usize,
    end: usize,
}

impl<G: Deref<Target = Storage>> Deref for Elements<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.guard {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.start..self.end],
            _ => unreachable!("`read` let no other storage pass"),
        }
    }
}

/// The elements of a contiguous `f32` tensor on the CPU.
pub(crate) fn read<'a>(kernel: &str, name: &str, tensor: &'a Tensor) -> Result<impl Deref<Target = [f32]> + 'a> {
    let (guard, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*guard else {
        bail!("{kernel}: {name} is on {:?}: kernels run on the CPU only", tensor.device());
    };
    check_dtype(kernel, name, storage)?;
    let (start, end) = contiguous(kernel, name, layout)?;
    Ok(Elements { guard, start, end })
}

/// Overwrites a tensor's elements in place and gives it back. Nobody else may count on the old
/// ones: a storage that `reading` shares is copied first.
pub(crate) fn update(
    kernel: &'static str,
    name: &'static str,
    tensor: Tensor,
    reading: &[&Tensor],
    f: impl FnOnce(&mut [f32]) -> Result<()>,
) -> Result<Tensor> {
    // candle's lock is not reentrant: writing what `f` reads would wait for itself.
    let shared = reading.iter().any(|other| {
        let (a, b) = (tensor.storage_and_layout().0, other.storage_and_layout().0);
        std::ptr::eq(&*a, &*b)
    });
    let tensor = if shared { tensor.copy()? } else { tensor };
    tensor.inplace_op1(&Update { kernel, name, f: Cell::new(Some(f)) })?;
    Ok(tensor)
}

struct Update<F> {
    kernel: &'static str,
    name: &'static str,
    f: Cell<Option<F>>,
}

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Update<F> {
    #[allow(clippy::misnamed_getters)] // candle calls the op's name what is the kernel's here
    fn name(&self) -> &'static str {
        self.kernel
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        check_dtype(self.kernel, self.name, storage)?;
        let (start, end) = contiguous(self.kernel, self.name, layout)?;
        match (storage, self.f.take()) {
            (CpuStorage::F32(data), Some(f)) => f(&mut data[start..end]),
            _ => unreachable!("the dtype was checked, and candle calls an op once"),
        }
    }
}

fn check_dtype(kernel: &str, name: &str, storage: &CpuStorage) -> Result<()> {
    use candle_core::backend::BackendStorage;
    match storage {
        CpuStorage::F32(_) => Ok(()),
        other => bail!("{kernel}: {name} is {:?}: needs F32", other.dtype()),
    }
}

fn contiguous(kernel: &str, name: &str, layout: &Layout) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some(offsets) => Ok(offsets),
        None => bail!(
            "{kernel}: {name} has shape {:?} with strides {:?}: needs to be contiguous",
            layout.dims(),
            layout.stride()
        ),
    }
}

/// A matrix's rows and columns.
pub(crate) fn matrix(kernel: &str, name: &str, tensor: &Tensor) -> Result<(usize, usize)> {
    match *tensor.dims() {
        [rows, columns] => Ok((rows, columns)),
        ref dims => bail!("{kernel}: {name} has shape {dims:?}: needs [rows, columns]"),
    }
}

/// Fails unless `tensor` has the shape that `because` calls for.
pub(crate) fn check_dims(kernel: &str, name: &str, tensor: &Tensor, dims: &[usize], because: &str) -> Result<()> {
    if tensor.dims() != dims {
        bail!("{kernel}: {name} has shape {:?}: needs {dims:?}, as {because} has", tensor.dims());
    }
    Ok(())
}

/// Fails unless a parameter's view has `len` elements.
pub(crate) fn check_len(kernel: &str, name: &str, got: usize, shape: &[usize]) -> Result<()> {
    if got != shape.iter().product::<usize>() {
        bail!("{kernel}: {name} has {got} elements: needs {shape:?}");
    }
    Ok(())
}

/// Memory for `len` elements. Filling it with zeros first would cost a pass over memory, and
/// every kernel writes all that it returns.
pub(crate) fn uninit(len: usize) -> Vec<MaybeUninit<f32>> {
    let mut data = Vec::with_capacity(len);
    // SAFETY: the capacity is there, and a MaybeUninit needs no initialisation.
    unsafe { data.set_len(len) };
    data
}

/// # Safety
/// Every element has been written.
pub(crate) unsafe fn assume_init(data: Vec<MaybeUninit<f32>>) -> Vec<f32> {
    let mut data = std::mem::ManuallyDrop::new(data);
    // SAFETY: MaybeUninit<f32> lies in memory as f32 does; the parts come from a Vec that is not dropped.
    unsafe { Vec::from_raw_parts(data.as_mut_ptr().cast(), data.len(), data.capacity()) }
}

/// # Safety
/// Every element has been written.
pub(crate) unsafe fn assume_init_mut(data: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    // SAFETY: MaybeUninit<f32> lies in memory as f32 does.
    unsafe { &mut *(std::ptr::from_mut(data) as *mut [f32]) }
}

/// # Safety
/// Only numbers are written to it.
pub(crate) unsafe fn as_uninit(data: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: f32 lies in memory as MaybeUninit<f32> does.
    unsafe { &mut *(std::ptr::from_mut(data) as *mut [MaybeUninit<f32>]) }
}

/// Copies `source` into memory that may hold nothing yet.
#[inline(always)]
pub(crate) fn copy<'a>(destination: &'a mut [MaybeUninit<f32>], source: &[f32]) -> &'a mut [f32] {
    assert_eq!(destination.len(), source.len());
    for (d, &s) in destination.iter_mut().zip(source) {
        d.write(s);
    }
    // SAFETY: the loop wrote them all.
    unsafe { assume_init_mut(destination) }
}

/// A tensor of what was written.
///
/// # Safety
/// Every element has been written.
pub(crate) unsafe fn tensor(data: Vec<MaybeUninit<f32>>, dims: &[usize], like: &Tensor) -> Result<Tensor> {
    // SAFETY: the caller's promise.
    Tensor::from_vec(unsafe { assume_init(data) }, dims, like.device())
}
