//! Matrix products by the `gemm` crate, one thread each: kernels split the work themselves.
use gemm::Parallelism;
use std::mem::MaybeUninit;

/// A matrix with any strides, to read.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// All of `data`, row after row.
    pub fn new(data: &'a [f32], columns: usize) -> Self {
        let rows = data.len() / columns.max(1);
        assert_eq!(rows * columns, data.len());
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Some of the rows.
    pub fn rows(self, rows: std::ops::Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        Self { data: &self.data[(rows.start * self.row_stride).min(self.data.len())..], rows: rows.len(), ..self }
    }
}

/// `c = a·b`; `c` may hold nothing yet.
pub(crate) fn write(c: &mut [MaybeUninit<f32>], a: Matrix, b: Matrix) {
    // SAFETY: without reading, the product overwrites every element of c.
    unsafe { product(c, a, b, false) }
}

/// `c += a·b`.
pub(crate) fn add(c: &mut [f32], a: Matrix, b: Matrix) {
    // SAFETY: f32 lies in memory as MaybeUninit<f32> does, and only numbers are written to it.
    unsafe { product(&mut *(std::ptr::from_mut(c) as *mut [MaybeUninit<f32>]), a, b, true) }
}

/// # Safety
/// Where `accumulate` is set, `c` is initialised.
unsafe fn product(c: &mut [MaybeUninit<f32>], a: Matrix, b: Matrix, accumulate: bool) {
    assert_eq!(a.columns, b.rows);
    assert_eq!(a.rows * b.columns, c.len());
    // SAFETY: the asserts above, and a Matrix never reaches past its slice: it is made from the
    // whole of one, transposed or cut to fewer rows.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            c.as_mut_ptr().cast::<f32>(),
            1,
            b.columns as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}
