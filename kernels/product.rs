//! Matrix products: for some terms of the sum at a time, `b` is packed into panels as wide as a
//! register tile, which all threads read, and each thread runs its own rows of `a` against them (Goto
//! and van de Geijn 2008).
//!
//! The terms go in the same blocks whatever the number of rows and threads: an element has the same
//! bits in any batch.
use crate::{
    cpu, simd, threads,
    tile::{self, Start},
};
use rayon::prelude::*;
use std::{cell::RefCell, mem::MaybeUninit};

/// Terms that are packed at a time: a tile's rows of `a` stay in the first-level cache meanwhile, a
/// panel of `b` in the second.
pub(crate) const TERMS: usize = 512;
/// Rows of `a` that meet a panel of `b` one after another.
const ROWS: usize = 96;
/// Rows this many bytes apart fall on the same lines of a first-level cache.
const ALIAS: usize = 2048;

thread_local! {
    /// A thread's packed rows of `a`.
    static PACKED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

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

    fn at(self, row: usize, column: usize) -> &'a [f32] {
        &self.data[row * self.row_stride + column * self.column_stride..]
    }
}

/// `c = a·b`, each row from `bias` on where there is one; `c` may hold nothing yet.
pub(crate) fn write(c: &mut [MaybeUninit<f32>], a: Matrix, b: Matrix, bias: Option<&[f32]>) {
    let start = match bias {
        Some(bias) => {
            assert_eq!(bias.len(), b.columns);
            Start::Row(bias.as_ptr())
        }
        None => Start::Zero,
    };
    // SAFETY: the product overwrites every element of c, and reads none before; bias has b's columns.
    unsafe { product(c, a, b, start) }
}

/// `c += a·b`.
pub(crate) fn add(c: &mut [f32], a: Matrix, b: Matrix) {
    // SAFETY: c is initialised.
    unsafe { product(cpu::as_uninit(c), a, b, Start::Sum) }
}

/// What [`Start`] points to is read from several threads.
#[derive(Clone, Copy)]
struct Shared(Start);

// SAFETY: nobody writes to it meanwhile.
unsafe impl Sync for Shared {}

/// # Safety
/// `c` is initialised where the sum starts from it, and a row to start from has as many elements
/// as `b` has columns.
unsafe fn product(c: &mut [MaybeUninit<f32>], a: Matrix, b: Matrix, start: Start) {
    assert_eq!(a.columns, b.rows);
    assert_eq!(a.rows * b.columns, c.len());
    assert!(b.rows > 0 || start == Start::Sum || c.is_empty());
    if c.is_empty() || b.rows == 0 {
        return;
    }
    let (tile_rows, width) = tile::shape();
    let (bias, columns) = (Shared(start), b.columns);
    let blocks = b.rows.div_ceil(TERMS);
    let terms = b.rows.div_ceil(blocks);
    let direct = a.column_stride == 1 && !(a.row_stride * size_of::<f32>()).is_multiple_of(ALIAS);
    let step = if direct { ROWS } else { tile_rows };
    let mut panels = cpu::uninit(terms * columns); // one after another, each [terms, its width]
    for term in (0..blocks).map(|block| block * terms) {
        let k = terms.min(b.rows - term);
        threads::install(|| {
            panels[..k * columns].par_chunks_mut(k * width).enumerate().for_each(|(i, panel)| {
                pack(panel, b.at(term, i * width), b.column_stride, b.row_stride, k);
            });
            // SAFETY: the chunks cover it, and each was written.
            let panels = unsafe { cpu::assume_init_mut(&mut panels[..k * columns]) };
            let share = threads::share(a.rows, ROWS).next_multiple_of(tile_rows);
            c.par_chunks_mut(share * columns).enumerate().for_each(|(i, c)| {
                let (first, rows) = (i * share, c.len() / columns);
                let c = c.as_mut_ptr().cast::<f32>();
                for block in (0..rows).step_by(ROWS) {
                    let block = block..(block + ROWS).min(rows);
                    let tiles = block.clone().step_by(step).map(|row| (row, step.min(block.end - row)));
                    PACKED.with_borrow_mut(|packed| {
                        packed.resize(ROWS * terms, 0.0);
                        if !direct {
                            for (row, m) in tiles.clone() {
                                let to = &mut packed[(row - block.start) * k..][..m * k];
                                // SAFETY: `pack` writes numbers only.
                                let to = unsafe { cpu::as_uninit(to) };
                                pack(to, a.at(first + row, term), a.row_stride, a.column_stride, k);
                            }
                        }
                        for (i, panel) in panels.chunks(k * width).enumerate() {
                            let n = width.min(columns - i * width);
                            let start = match { bias }.0 {
                                _ if term > 0 => Start::Sum,
                                // SAFETY: the row has as many elements as b has columns.
                                Start::Row(row) => Start::Row(unsafe { row.add(i * width) }),
                                start => start,
                            };
                            for (row, m) in tiles.clone() {
                                let (a, a_row, a_column) = match direct {
                                    true => (a.at(first + row, term), a.row_stride, 1),
                                    false => (&packed[(row - block.start) * k..], 1, m),
                                };
                                // SAFETY: rows, columns and terms are within the matrices; nobody else
                                // has these rows of c, and what they were summed to is initialised.
                                unsafe {
                                    let c = c.add(row * columns + i * width);
                                    let (a, b, b_row, c_row) = (a.as_ptr(), panel.as_ptr(), n, columns);
                                    tile::Product { m, n, k, a, a_row, a_column, b, b_row, c, c_row, start }.run();
                                }
                            }
                        }
                    });
                }
            });
        });
    }
}

simd::vectorized! {
    /// `to[term, lane] = from[lane * lane_stride + term * term_stride]`.
    fn pack(to: &mut [MaybeUninit<f32>], from: &[f32], lane_stride: usize, term_stride: usize, terms: usize) {
        /// Terms whose rows of `to` stay in the first-level cache.
        const BLOCK: usize = 16;
        let lanes = to.len() / terms;
        if lane_stride == 1 {
            for (term, to) in to.chunks_exact_mut(lanes).enumerate() {
                cpu::copy(to, &from[term * term_stride..][..lanes]);
            }
            return;
        }
        for (block, to) in to.chunks_mut(BLOCK * lanes).enumerate() {
            for lane in 0..lanes {
                let from = &from[lane * lane_stride + block * BLOCK * term_stride..];
                for (term, to) in to.chunks_exact_mut(lanes).enumerate() {
                    to[lane].write(from[term * term_stride]);
                }
            }
        }
    }
}
