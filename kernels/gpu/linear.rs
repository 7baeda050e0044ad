//! [`linear`](crate::linear) by a library's matrix products.
use super::{Arg, Gpu, columns, operands::*};
use crate::{Grad, View, ViewMut, cpu, linear::outputs};
use candle_core::{DType, Result, Tensor};

/// A row-major matrix, or the transpose of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub address: Arg,
    pub transposed: bool,
}

/// `c = a·b`, or `c += a·b`, for `a` `[m, k]`, `b` `[k, n]` and `c` `[m, n]`, which is row-major. Sums are
/// f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix,
    pub b: Matrix,
    /// What `a` and `b` are.
    pub dtype: DType,
    pub c: Arg,
    /// What `c` is: as `a` and `b`, or F32.
    pub c_dtype: DType,
    /// Whether the product is added to what is in `c`.
    pub add: bool,
}

/// A product as libraries take it, for which matrices lie column by column: the rows of row-major ones
/// are their columns. They compute cᵀ `[m, n]` = bᵀ·aᵀ, so `first` is b.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ColumnMajor {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub first: Factor,
    pub second: Factor,
    /// Elements between c's columns.
    pub ldc: usize,
}

/// A factor of a product as libraries take it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factor {
    pub address: Arg,
    /// Whether the library transposes it.
    pub transposed: bool,
    /// As it lies in memory, before that.
    pub rows: usize,
    pub columns: usize,
    /// Elements between its columns.
    pub ld: usize,
}

impl Product {
    /// What a library is to be told.
    pub fn column_major(&self) -> ColumnMajor {
        let factor = |matrix: Matrix, height: usize, width: usize| {
            let (height, width) = if matrix.transposed { (width, height) } else { (height, width) }; // as it lies
            Factor { address: matrix.address, transposed: matrix.transposed, rows: width, columns: height, ld: width }
        };
        ColumnMajor {
            m: self.n,
            n: self.m,
            k: self.k,
            first: factor(self.b, self.k, self.n),
            second: factor(self.a, self.m, self.k),
            ldc: self.n,
        }
    }
}

/// A GPU with a library of matrix products.
pub(crate) trait Blas: Gpu {
    /// Computes a product.
    ///
    /// # Errors
    /// What the library refuses.
    fn product(&self, product: &Product) -> Result<()>;

    /// Computes a product and adds `bias` `[n]`, of `c`'s dtype, to its rows in the same pass. False where
    /// the library cannot: then nothing was computed.
    ///
    /// # Errors
    /// What the library refuses.
    fn product_with_bias(&self, product: &Product, bias: Arg) -> Result<bool>;
}

fn plain(address: Arg) -> Matrix {
    Matrix { address, transposed: false }
}

fn transposed(address: Arg) -> Matrix {
    Matrix { address, transposed: true }
}

pub(crate) fn forward(gpu: &impl Blas, x: &Tensor, w: View, b: Option<View>) -> Result<Tensor> {
    const KERNEL: &str = "linear::forward";
    let (rows, inputs) = cpu::matrix(KERNEL, "x", x)?;
    let outputs = outputs(KERNEL, inputs, w)?;
    let operands = Operands::like(KERNEL, "x", x)?;
    let y = operands.empty(&[rows, outputs])?;
    let product = Product {
        m: rows,
        n: outputs,
        k: inputs,
        a: plain(operands.activation("x", x)?),
        b: transposed(operands.weight("w", w)?),
        dtype: x.dtype(),
        c: operands.activation("y", &y)?,
        c_dtype: x.dtype(),
        add: false,
    };
    // cuBLASLt's epilogue takes a bias of the output's dtype.
    let bias = b.map(|b| operands.weight("b", b)).transpose()?;
    if let Some(bias) = bias
        && gpu.product_with_bias(&product, bias)?
    {
        return Ok(y);
    }
    gpu.product(&product)?;
    if let Some(bias) = bias {
        columns::add_bias(gpu, &operands, &y, bias)?;
    }
    Ok(y)
}

pub(crate) fn backward(
    gpu: &impl Blas,
    x: &Tensor,
    dy: &Tensor,
    w: View,
    dx: Grad,
    mut dw: Option<ViewMut>,
    mut db: Option<ViewMut>,
) -> Result<Option<Tensor>> {
    const KERNEL: &str = "linear::backward";
    let (rows, inputs) = cpu::matrix(KERNEL, "x", x)?;
    let outputs = outputs(KERNEL, inputs, w)?;
    let operands = Operands::like(KERNEL, "x", x)?;
    let (x_data, dy_data) = (operands.activation("x", x)?, operands.activation("dy", dy)?);
    if dw.is_some() {
        gpu.product(&Product {
            m: outputs,
            n: inputs,
            k: rows,
            a: transposed(dy_data),
            b: plain(x_data),
            dtype: x.dtype(),
            c: operands.gradient("dw", dw.as_mut())?,
            c_dtype: DType::F32,
            add: true,
        })?;
    }
    if db.is_some() {
        let db = operands.gradient("db", db.as_mut())?;
        columns::add_sums(gpu, &operands, db, "dy", dy)?;
    }
    let (dx, add) = match dx {
        Grad::Skip => return Ok(None),
        Grad::New => (operands.empty(&[rows, inputs])?, false),
        Grad::Into(dx) => {
            cpu::check_dims(KERNEL, "dx", &dx, &[rows, inputs], "x")?;
            (operands.own(dx, &[x, dy])?, true)
        }
    };
    gpu.product(&Product {
        m: rows,
        n: inputs,
        k: outputs,
        a: plain(dy_data),
        b: plain(operands.weight("w", w)?),
        dtype: x.dtype(),
        c: operands.activation("dx", &dx)?,
        c_dtype: x.dtype(),
        add,
    })?;
    Ok(Some(dx))
}

#[cfg(test)]
mod tests {
    use super::super::{emulated::Emulator, testing::*};
    use super::*;
    use crate::{Buffer, Device, testing::*};
    use half::bf16;

    /// The library's twin, element by element, as the manual of cublasGemmEx defines it.
    impl Blas for Emulator {
        fn product(&self, p: &Product) -> Result<()> {
            let ColumnMajor { m, n, k, first, second, ldc } = p.column_major();
            let address = |arg: Arg| if let Arg::Pointer(address) = arg { address } else { 0 };
            // SAFETY: the matrices have the product's sizes.
            let get = |at: u64, dtype: DType, i: usize| unsafe {
                match dtype {
                    DType::F32 => *(at as *const f32).add(i),
                    _ => (*(at as *const bf16).add(i)).to_f32(),
                }
            };
            let factor = |factor: Factor, row: usize, column: usize| {
                let (row, column) = if factor.transposed { (column, row) } else { (row, column) };
                assert!(row < factor.rows && column < factor.columns && factor.rows <= factor.ld);
                get(address(factor.address), p.dtype, row + column * factor.ld)
            };
            let c = address(p.c);
            for i in 0..m {
                for j in 0..n {
                    let at = i + j * ldc;
                    let mut sum = if p.add { get(c, p.c_dtype, at) } else { 0.0 };
                    for l in 0..k {
                        sum += factor(first, i, l) * factor(second, l, j);
                    }
                    // SAFETY: as above.
                    unsafe {
                        match p.c_dtype {
                            DType::F32 => *(c as *mut f32).add(at) = sum,
                            _ => *(c as *mut bf16).add(at) = bf16::from_f32(sum),
                        }
                    }
                }
            }
            Ok(())
        }

        /// Only even sizes, so that both ways are gone.
        fn product_with_bias(&self, p: &Product, bias: Arg) -> Result<bool> {
            if p.n % 2 == 1 {
                return Ok(false);
            }
            let (Arg::Pointer(bias), Arg::Pointer(c)) = (bias, p.c) else { return Ok(false) };
            for i in 0..p.m * p.n {
                // SAFETY: c is [m, n], the bias [n], both of c's dtype.
                unsafe {
                    match p.c_dtype {
                        DType::F32 => *(c as *mut f32).add(i) = *(bias as *const f32).add(i % p.n),
                        _ => *(c as *mut bf16).add(i) = *(bias as *const bf16).add(i % p.n),
                    }
                }
            }
            self.product(&Product { add: true, ..*p })?;
            Ok(true)
        }
    }

    /// Weights are rounded to bf16 here and not for the CPU: 2⁻⁸ of each, and once more of the result.
    const BF16: f32 = 1.0 / 64.0;

    gpu_tests!(is_the_cpus);

    fn is_the_cpus(case: &Case<impl Blas>) -> Result<()> {
        for (rows, inputs, outputs) in [(1, 3, 5), (150, 9, 33), (300, 16, 72), (7, 64, 3)] {
            let (size, tolerance) = (outputs * inputs, case.tolerance(TWIN, BF16));
            let (x, dy) = (case.inputs(&tensor(1, &[rows, inputs]))?, case.inputs(&tensor(2, &[rows, outputs]))?);
            let host = buffer(1, size + outputs);
            let device = case.parameters(&host)?;
            let [w, b] = [0..size, size..size + outputs].map(|range| device.view(range));
            let [host_w, host_b] = [0..size, size..size + outputs].map(|range| host.view(range));
            for bias in [false, true] {
                let y = forward(case.gpu, &x.device, w, bias.then_some(b))?;
                let want = crate::linear::forward(&x.host, host_w, bias.then_some(host_b))?;
                case.close("y", &y, &want, tolerance);
            }
            let sum = case.inputs(&tensor(3, &[rows, inputs]))?;
            for into in [false, true] {
                let grad = |sum: Tensor| if into { Grad::Into(sum) } else { Grad::New };
                let threes = |device: &Device| Buffer::from_vec(vec![3.0; size + outputs], device);
                let (mut got, mut want) = (threes(case.device)?, threes(&Device::Cpu)?);
                let [dw, db] = got.views_mut([0..size, size..size + outputs])?;
                let dx = backward(case.gpu, &x.device, &dy.device, w, grad(case.copy(&sum)?), Some(dw), Some(db))?;
                let [dw, db] = want.views_mut([0..size, size..size + outputs])?;
                let sum = grad(sum.host.copy()?);
                let want_dx = crate::linear::backward(&x.host, &dy.host, host_w, sum, Some(dw), Some(db))?;
                case.close("dx", &dx.unwrap(), &want_dx.unwrap(), tolerance);
                assert_close("dw, db", &all(&got), &all(&want), TWIN); // from rounded x and dy, in f32
            }
            assert!(backward(case.gpu, &x.device, &dy.device, w, Grad::Skip, None, None)?.is_none());
        }
        Ok(())
    }
}
