//! Register tiles: the inner loops of every matrix product.
//!
//! Every element is summed over `k` in order by one accumulator, and then added to what is there, so a
//! result does not depend on how the work was cut.
use crate::simd::{Level, level};

/// Where columns are a multiple of this, every tile is as wide as vectors are.
pub(crate) const WIDTH: usize = 16;

/// What an element's sum starts from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Start {
    /// Nothing: `c` may not be initialised.
    Zero,
    /// What is in `c`.
    Sum,
    /// This row's element of the same column: a bias.
    Row(*const f32),
}

/// `c[m, n] = start + a[m, k]·b[k, n]`. Element `[i, p]` of `a` is at `a[i * a_row + p * a_column]`;
/// rows of `b` and `c` are contiguous, `b_row` and `c_row` apart.
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
    pub start: Start,
}

/// Rows of a tile at full height, and columns at full width: with them in registers there is just
/// room for a row of `b` and an element of `a`.
pub(crate) fn shape() -> (usize, usize) {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => (8, 48),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => (6, 16),
        Level::Baseline => (8, 8),
    }
}

impl Product {
    /// # Safety
    /// The matrices lie in live memory; `a`, `b` and the row to start from are initialised, and `c`
    /// where the sum starts from it; nothing else uses `c` meanwhile.
    pub unsafe fn run(self) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            unsafe fn avx512(p: Product) {
                // SAFETY: the caller's promise.
                unsafe {
                    let n = p.columns::<8, 48, true>(0);
                    let n = p.columns::<8, 32, true>(n);
                    let n = p.columns::<8, 16, true>(n);
                    p.columns::<8, 1, true>(n);
                }
            }
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2(p: Product) {
                // SAFETY: the caller's promise.
                unsafe {
                    let n = p.columns::<6, 16, true>(0);
                    let n = p.columns::<6, 8, true>(n);
                    p.columns::<6, 1, true>(n);
                }
            }
            // SAFETY: the caller's promise, and this CPU has the features.
            match level() {
                Level::Avx512 => return unsafe { avx512(self) },
                Level::Avx2 => return unsafe { avx2(self) },
                Level::Baseline => {}
            }
        }
        // Without the instruction a fused multiply-add is a call; every aarch64 has it.
        const FUSED: bool = cfg!(target_arch = "aarch64");
        // SAFETY: the caller's promise.
        unsafe {
            let n = self.columns::<8, 8, FUSED>(0);
            self.columns::<8, 1, FUSED>(n);
        }
    }

    /// All tiles of `W` columns from `column` on; returns the first column that is left.
    #[inline(always)]
    unsafe fn columns<const R: usize, const W: usize, const FUSED: bool>(self, mut column: usize) -> usize {
        while column + W <= self.n {
            let mut row = 0;
            // SAFETY: the loops stay within m and n.
            unsafe {
                while row + R <= self.m {
                    self.tile::<R, W, FUSED>(row, column);
                    row += R;
                }
                if row + 4 <= self.m {
                    self.tile::<4, W, FUSED>(row, column);
                    row += 4;
                }
                if row + 2 <= self.m {
                    self.tile::<2, W, FUSED>(row, column);
                    row += 2;
                }
                if row < self.m {
                    self.tile::<1, W, FUSED>(row, column);
                }
            }
            column += W;
        }
        column
    }

    /// `R` rows and `W` columns of `c`, which stay in registers.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // one form for a, c and total
    unsafe fn tile<const R: usize, const W: usize, const FUSED: bool>(self, row: usize, column: usize) {
        let mut total = [[0.0f32; W]; R];
        // SAFETY: rows and columns are within the matrices.
        unsafe {
            let c = self.c.add(row * self.c_row + column);
            if let Start::Row(start) = self.start {
                total = [*start.add(column).cast::<[f32; W]>(); R];
            }
            let a = self.a.add(row * self.a_row);
            let b = self.b.add(column);
            for p in 0..self.k {
                let b = *b.add(p * self.b_row).cast::<[f32; W]>();
                for r in 0..R {
                    let a = *a.add(r * self.a_row + p * self.a_column);
                    for w in 0..W {
                        total[r][w] = if FUSED { a.mul_add(b[w], total[r][w]) } else { a * b[w] + total[r][w] };
                    }
                }
            }
            if self.start == Start::Sum {
                // At the end: a long sum goes on block by block, and rounds less than a chain of all terms.
                for r in 0..R {
                    let c = *c.add(r * self.c_row).cast::<[f32; W]>();
                    for w in 0..W {
                        total[r][w] += c[w];
                    }
                }
            }
            for r in 0..R {
                *c.add(r * self.c_row).cast::<[f32; W]>() = total[r];
            }
        }
    }
}
