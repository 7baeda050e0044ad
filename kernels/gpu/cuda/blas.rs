//! Matrix products by cuBLAS, and by cuBLASLt where a bias rides on them. Sums are f32, and so are the
//! partial sums of products that are split.
use super::{Arg, Cuda, driver, lock};
use crate::gpu::linear::{Blas, ColumnMajor, Factor, Product};
use candle_core::{CudaDevice, DType, Result};
use cudarc::{
    cublas::{self, sys::cublasComputeType_t as Compute, sys::cublasOperation_t as Operation},
    cublaslt::{self, result::CublasError, sys as lt},
    driver::{CudaSlice, DevicePtr},
};
use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

/// Bytes that NVIDIA advises to give the library on Hopper; others take less.
const WORKSPACE: usize = 32 << 20;

/// Both libraries on the device's stream.
pub(super) struct Library {
    blas: Arc<cublas::CudaBlas>,
    lt: Mutex<Lt>,
    workspace: CudaSlice<u8>,
    tf32: AtomicBool,
}

/// What says which algorithm a product takes: sizes, transposes, whether factors and result are bf16, TF32,
/// and what the addresses are multiples of.
type Key = (usize, usize, usize, [i32; 2], bool, bool, bool, [u32; 4]);

/// cuBLASLt, and what it advised: asking takes as long as some launches, and a model's layers ask the same.
struct Lt {
    handle: lt::cublasLtHandle_t,
    found: HashMap<Key, Option<lt::cublasLtMatmulAlgo_t>>,
}

// SAFETY: a handle may be used from any thread, by one at a time.
unsafe impl Send for Lt {}

impl Drop for Lt {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { cublaslt::result::destroy_handle(self.handle) };
    }
}

impl Library {
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let blas = device.cublas_handle();
        let exact = cublas::sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle is candle's, and lives.
        said(unsafe { cublas::sys::cublasSetMathMode(*blas.handle(), exact) }.result(), "setting its math mode")?;
        let handle = said(cublaslt::result::create_handle(), "starting cuBLASLt")?;
        let lt = Mutex::new(Lt { handle, found: HashMap::new() });
        // SAFETY: the library writes what it reads of it.
        let workspace = unsafe { device.cuda_stream().alloc(WORKSPACE) };
        Ok(Self { blas, lt, workspace: driver(workspace, "a workspace of 32 MiB")?, tf32: AtomicBool::new(false) })
    }

    pub fn allow_tf32(&self, allow: bool) {
        self.tf32.store(allow, Ordering::Relaxed);
    }

    fn is_tf32(&self, dtype: DType) -> bool {
        dtype == DType::F32 && self.tf32.load(Ordering::Relaxed)
    }
}

fn said<T, E: std::fmt::Debug>(result: std::result::Result<T, E>, what: &str) -> Result<T> {
    result.map_err(|e| candle_core::Error::Msg(format!("cuBLAS, {what}: {e:?}")))
}

fn pointer(arg: Arg) -> *mut c_void {
    match arg {
        Arg::Pointer(address) => address as *mut c_void,
        _ => std::ptr::null_mut(), // matrices are made with addresses
    }
}

fn operation(factor: Factor) -> Operation {
    if factor.transposed { Operation::CUBLAS_OP_T } else { Operation::CUBLAS_OP_N }
}

fn describe(p: &Product) -> String {
    let Product { m, n, k, dtype, .. } = p;
    format!("the product of [{m}, {k}] and [{k}, {n}] in {dtype:?}")
}

impl Blas for Cuda {
    fn product(&self, p: &Product) -> Result<()> {
        use cublas::sys::cudaDataType;
        let kind = |dtype| if dtype == DType::BF16 { cudaDataType::CUDA_R_16BF } else { cudaDataType::CUDA_R_32F };
        let tf32 = self.blas.is_tf32(p.dtype);
        let compute = if tf32 { Compute::CUBLAS_COMPUTE_32F_FAST_TF32 } else { Compute::CUBLAS_COMPUTE_32F };
        let (alpha, beta) = (1f32, if p.add { 1f32 } else { 0f32 });
        let size = |size: usize| {
            i32::try_from(size)
                .map_err(|_| candle_core::Error::Msg(format!("cuBLAS, {}: a size of {size} is past 2³¹", describe(p))))
        };
        let context = self.device.cuda_stream().context().clone();
        driver(context.bind_to_thread(), "cuBLAS")?;
        let ColumnMajor { m, n, k, first, second, ldc } = p.column_major();
        // SAFETY: the matrices lie in live memory of these sizes; alpha and beta are the host's.
        said(
            unsafe {
                cublas::result::gemm_ex(
                    *self.blas.blas.handle(),
                    operation(first),
                    operation(second),
                    size(m)?,
                    size(n)?,
                    size(k)?,
                    (&raw const alpha).cast(),
                    pointer(first.address),
                    kind(p.dtype),
                    size(first.ld)?,
                    pointer(second.address),
                    kind(p.dtype),
                    size(second.ld)?,
                    (&raw const beta).cast(),
                    pointer(p.c),
                    kind(p.c_dtype),
                    size(ldc)?,
                    compute,
                    cublas::sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            },
            &describe(p),
        )
    }

    fn product_with_bias(&self, p: &Product, bias: Arg) -> Result<bool> {
        use lt::cudaDataType;
        let what = describe(p);
        let kind = |dtype| if dtype == DType::BF16 { cudaDataType::CUDA_R_16BF } else { cudaDataType::CUDA_R_32F };
        let tf32 = self.blas.is_tf32(p.dtype);
        let compute = match tf32 {
            true => lt::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => lt::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let stream = self.device.cuda_stream();
        driver(stream.context().bind_to_thread(), "cuBLASLt")?;

        use lt::cublasLtMatmulDescAttributes_t as Set;
        let description = said(Description::new(compute), &what)?;
        let ColumnMajor { m, n, k, first, second, ldc } = p.column_major();
        let transposed = [first, second].map(|factor| i32::from(factor.transposed)); // 1 is CUBLAS_OP_T
        let epilogue = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
        let bias_address = pointer(bias) as u64;
        said(description.set(Set::CUBLASLT_MATMUL_DESC_TRANSA, &transposed[0]), &what)?;
        said(description.set(Set::CUBLASLT_MATMUL_DESC_TRANSB, &transposed[1]), &what)?;
        said(description.set(Set::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue), &what)?;
        said(description.set(Set::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_address), &what)?;
        let layout = |factor: Factor| Layout::new(kind(p.dtype), factor.rows, factor.columns, factor.ld);
        let (a, b) = (said(layout(first), &what)?, said(layout(second), &what)?);
        let c = said(Layout::new(kind(p.c_dtype), m, n, ldc), &what)?;

        let addresses = [
            pointer(first.address) as u64,
            pointer(second.address) as u64,
            pointer(p.c) as u64,
            pointer(p.c) as u64 | bias_address, // the epilogue reads the bias as it writes the output
        ];
        let alignments = addresses.map(alignment);
        let key = (m, n, k, transposed, p.dtype == DType::BF16, p.c_dtype == DType::BF16, tf32, alignments);
        let Lt { handle, found } = &mut *lock(&self.blas.lt);
        let algorithm = match found.get(&key) {
            Some(algorithm) => *algorithm,
            None => {
                let algorithm = said(choose(*handle, &description, [&a, &b, &c], alignments), &what)?;
                found.insert(key, algorithm);
                algorithm
            }
        };
        let Some(algorithm) = algorithm else { return Ok(false) };

        let (alpha, beta) = (1f32, if p.add { 1f32 } else { 0f32 });
        // SAFETY: all objects live to the end of this function; the matrices lie in live memory of these
        // sizes, as does the workspace, and what is launched reads alpha and beta before it returns.
        unsafe {
            let computed = cublaslt::result::matmul(
                *handle,
                description.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(first.address),
                a.0,
                pointer(second.address),
                b.0,
                pointer(p.c),
                c.0,
                pointer(p.c),
                c.0,
                &raw const algorithm,
                self.blas.workspace.device_ptr(&stream).0 as *mut c_void,
                WORKSPACE,
                stream.cu_stream() as *mut _,
            );
            said(computed, &what)?;
        }
        Ok(true)
    }
}

/// The algorithm that the library advises for a product, if it has one.
fn choose(
    handle: lt::cublasLtHandle_t,
    description: &Description,
    [a, b, c]: [&Layout; 3],
    alignments: [u32; 4],
) -> std::result::Result<Option<lt::cublasLtMatmulAlgo_t>, CublasError> {
    use lt::cublasLtMatmulPreferenceAttributes_t as Prefer;
    let preference = Preference::new()?;
    preference.set(Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
    // Partial sums of a split product stay f32, and are summed in a fixed order.
    let reduction = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    preference.set(Prefer::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction)?;
    let attributes = [
        Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    ];
    for (attribute, alignment) in attributes.into_iter().zip(&alignments) {
        preference.set(attribute, alignment)?;
    }
    // SAFETY: all objects live to the end of this function.
    let found =
        unsafe { cublaslt::result::get_matmul_algo_heuristic(handle, description.0, a.0, b.0, c.0, c.0, preference.0) };
    match found {
        Ok(found) => Ok(Some(found.algo)),
        // Rows of an odd number of bf16, for one: no algorithm is for their alignment.
        Err(CublasError(
            lt::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED | lt::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE,
        )) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The largest power of two up to 256 that an address is a multiple of.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// A product's description, to the end of its scope.
struct Description(lt::cublasLtMatmulDesc_t);

impl Description {
    fn new(compute: lt::cublasComputeType_t) -> std::result::Result<Self, CublasError> {
        cublaslt::result::create_matmul_desc(compute, lt::cudaDataType::CUDA_R_32F).map(Self)
    }

    fn set<T>(&self, attribute: lt::cublasLtMatmulDescAttributes_t, value: &T) -> std::result::Result<(), CublasError> {
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: the value is read now, and has the attribute's size, which the library checks.
        unsafe { cublaslt::result::set_matmul_desc_attribute(self.0, attribute, value, size_of::<T>()) }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { cublaslt::result::destroy_matmul_desc(self.0) };
    }
}

/// A matrix's layout, to the end of its scope.
struct Layout(lt::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: lt::cudaDataType, rows: usize, columns: usize, ld: usize) -> std::result::Result<Self, CublasError> {
        cublaslt::result::create_matrix_layout(kind, rows as u64, columns as u64, ld as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { cublaslt::result::destroy_matrix_layout(self.0) };
    }
}

/// What is asked of an algorithm, to the end of its scope.
struct Preference(lt::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> std::result::Result<Self, CublasError> {
        cublaslt::result::create_matmul_pref().map(Self)
    }

    fn set<T>(
        &self,
        attribute: lt::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> std::result::Result<(), CublasError> {
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: the value is read now, and has the attribute's size, which the library checks.
        unsafe { cublaslt::result::set_matmul_pref_attribute(self.0, attribute, value, size_of::<T>()) }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { cublaslt::result::destroy_matmul_pref(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use crate::{Buffer, Result, allow_tf32, cuda_device, linear, testing::*};

    /// Factors of TF32 have 11 bits: 2⁻¹¹ of each, and by chance less of a sum.
    #[test]
    fn tf32_is_where_it_is_allowed() -> Result<()> {
        if cuda().is_none() {
            return Ok(());
        }
        let device = cuda_device(0)?; // its own: other tests' products stay f32
        let (x, w) = (tensor(1, &[256, 256]), buffer(1, 256 * 256));
        let want = values(&linear::forward(&x, w.view(0..w.len()), None)?);
        let (x, w) = (x.to_device(&device)?, Buffer::from_vec(all(&w), &device)?);
        for (allow, bounds) in [(false, 0.0..1e-5), (true, 1e-5..2e-3), (false, 0.0..1e-5)] {
            allow_tf32(&device, allow)?;
            let got = values(&linear::forward(&x, w.view(0..w.len()), None)?);
            let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let error = got.iter().zip(&want).map(|(g, w)| (g - w).abs() / largest).fold(0.0, f32::max);
            assert!(bounds.contains(&error), "TF32 {allow}: off by {error:e}");
        }
        Ok(())
    }
}
