//! Rows of tables, summed: BERT's words, positions and token types in one pass.
//!
//! The gradient touches the rows that the batch named, so it costs what the batch costs, not what
//! the vocabulary does.
use crate::{View, ViewMut, cpu, threads};
use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

/// Tables `[rows, hidden]`, each with one id for each token → `[tokens, hidden]`.
///
/// # Errors
/// Where the tables do not have `hidden` columns, differ in the number of ids, or have no row of
/// that id.
pub fn forward(tables: &[(View, &[u32])], hidden: usize) -> Result<Tensor> {
    const KERNEL: &str = "embedding::forward";
    let Some(&(_, ids)) = tables.first() else {
        bail!("{KERNEL}: no table");
    };
    let tokens = ids.len();
    for (i, (table, ids)) in tables.iter().enumerate() {
        check(KERNEL, &format!("table {i}"), table.len(), ids, hidden)?;
        if ids.len() != tokens {
            bail!("{KERNEL}: table {i} has {} ids, table 0 {tokens}", ids.len());
        }
    }
    let mut y = cpu::uninit(tokens * hidden);
    threads::install(|| {
        let share = threads::share(tokens, 64);
        y.par_chunks_mut(share * hidden).enumerate().for_each(|(i, y)| {
            for (token, y) in (i * share..).zip(y.chunks_exact_mut(hidden)) {
                let mut rows = tables.iter().map(|(table, ids)| {
                    let id = ids[token] as usize;
                    &table.data[id * hidden..(id + 1) * hidden]
                });
                let y = cpu::copy(y, rows.next().unwrap_or_default());
                for row in rows {
                    for (y, &x) in y.iter_mut().zip(row) {
                        *y += x;
                    }
                }
            }
        });
    });
    // SAFETY: the chunks cover y, and each row was written.
    let y = unsafe { cpu::assume_init(y) };
    Tensor::from_vec(y, (tokens, hidden), &Device::Cpu)
}

/// `dtable[ids[token]] += dy[token]` for `dy` `[tokens, hidden]`. Tokens are taken in their order,
/// so that equal ids always add up to the same bits.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: &Tensor, ids: &[u32], dtable: ViewMut) -> Result<()> {
    const KERNEL: &str = "embedding::backward";
    let (tokens, hidden) = cpu::matrix(KERNEL, "dy", dy)?;
    check(KERNEL, "dtable", dtable.len(), ids, hidden)?;
    if ids.len() != tokens {
        bail!("{KERNEL}: dy has {tokens} rows, but there are {} ids", ids.len());
    }
    let dy = cpu::read(KERNEL, "dy", dy)?;
    for (dy, &id) in dy.chunks_exact(hidden).zip(ids) {
        let row = id as usize * hidden;
        for (d, &dy) in dtable.data[row..row + hidden].iter_mut().zip(dy) {
            *d += dy;
        }
    }
    Ok(())
}

fn check(kernel: &str, table: &str, len: usize, ids: &[u32], hidden: usize) -> Result<()> {
    if hidden == 0 || len % hidden != 0 {
        bail!("{kernel}: {table} has {len} elements: needs [rows, {hidden}]");
    }
    let rows = len / hidden;
    if let Some(token) = ids.iter().position(|&id| id as usize >= rows) {
        bail!("{kernel}: {table} has {rows} rows, but the id at position {token} is {}", ids[token]);
    }
    Ok(())
}
