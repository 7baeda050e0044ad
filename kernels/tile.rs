//! Small matrix products, for attention: at 128 × 32 × 128 a general product spends its time on
//! planning and packing.
//!
//! Every element is summed over `k` in order by one accumulator, so a result does not depend on
//! how the work was cut.
use crate::simd::{Level, level};

/// Columns of a wide tile. A right-hand side padded to a multiple of this is taken fastest.
pub(crate) const WIDTH: usize = 32;

/// `c[m, n] = a[m, k]·b[k, n]`, added to `c` where `accumulate` is set. Element `[i, p]` of `a` is
/// at `a[i * a_row + p * a_column]`; rows of `b` and `c` are contiguous, `b_row` and `c_row` apart.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_column: usize,
    pub b: *const f32,
    pub b_row: usize,
    pub c: *mut f32,
    pub c_row: usize,
    pub accumulate: bool,
}

impl Product {
    /// # Safety
    /// The matrices lie in live memory; `a` and `b` are initialised, and `c` where `accumulate` is
    /// set; nothing else uses `c` meanwhile.
    pub unsafe fn run(self) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            unsafe fn avx512(p: Product) {
                // SAFETY: the caller's promise.
                unsafe { p.tiles::<8, 32>() }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2(p: Product) {
                // SAFETY: the caller's promise.
                unsafe { p.tiles::<6, 16>() }
            }
            // SAFETY: the caller's promise, and this CPU has the features.
            match level() {
                Level::Avx512 => return unsafe { avx512(self) },
                Level::Avx2 => return unsafe { avx2(self) },
                Level::Baseline => {}
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.tiles::<4, 8>() }
    }

    #[inline(always)]
    unsafe fn tiles<const R: usize, const W: usize>(self) {
        let mut column = 0;
        // SAFETY: the loops stay within m and n.
        unsafe {
            while column + W <= self.n {
                self.rows::<R, W>(column);
                column += W;
            }
            while column + 8 <= self.n {
                self.rows::<R, 8>(column);
                column += 8;
            }
            while column < self.n {
                self.rows::<R, 1>(column);
                column += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<const R: usize, const W: usize>(self, column: usize) {
        let mut row = 0;
        // SAFETY: the loops stay within m.
        unsafe {
            while row + R <= self.m {
                self.tile::<R, W>(row, column);
                row += R;
            }
            while row < self.m {
                self.tile::<1, W>(row, column);
                row += 1;
            }
        }
    }

    /// `R` rows and `W` columns of `c`, which stay in registers.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // one form for a, c and total
    unsafe fn tile<const R: usize, const W: usize>(self, row: usize, column: usize) {
        let mut total = [[0.0f32; W]; R];
        // SAFETY: rows and columns are within the matrices.
        unsafe {
            let c = self.c.add(row * self.c_row + column);
            if self.accumulate {
                for r in 0..R {
                    total[r] = *c.add(r * self.c_row).cast::<[f32; W]>();
                }
            }
            let a = self.a.add(row * self.a_row);
            let b = self.b.add(column);
            for p in 0..self.k {
                let b = *b.add(p * self.b_row).cast::<[f32; W]>();
                for r in 0..R {
                    let a = *a.add(r * self.a_row + p * self.a_column);
                    for w in 0..W {
                        total[r][w] = a.mul_add(b[w], total[r][w]);
                    }
                }
            }
            for r in 0..R {
                *c.add(r * self.c_row).cast::<[f32; W]>() = total[r];
            }
        }
    }
}
