//! Rows of tables, summed: BERT's words, positions and token types in one pass.
//!
//! The gradient touches the rows that the batch named, so it costs what the batch costs, not what
//! the vocabulary does.
use crate::device::on_gpu;
use crate::{View, ViewMut, cpu, threads};
use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

/// Tables `[rows, hidden]`, each with one id for each token → `[tokens, hidden]`, on the tables' device.
///
/// # Errors
/// Where the tables do not have `hidden` columns, differ in the number of ids, or have no row of
/// that id.
pub fn forward<'a>(tables: &[(View<'a>, &'a [u32])], hidden: usize) -> Result<Tensor> {
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
    on_gpu!(tables[0].0.device(), |gpu| crate::gpu::embedding::forward(&*gpu, tables, tokens, hidden));
    let read =
        |(i, (table, ids)): (usize, &(View<'a>, &'a [u32]))| Ok((table.host(KERNEL, &format!("table {i}"))?, *ids));
    let tables: Vec<(&[f32], &[u32])> = tables.iter().enumerate().map(read).collect::<Result<_>>()?;
    let mut y = cpu::uninit(tokens * hidden);
    threads::install(|| {
        let share = threads::share(tokens, 64);
        y.par_chunks_mut(share * hidden).enumerate().for_each(|(i, y)| {
            for (token, y) in (i * share..).zip(y.chunks_exact_mut(hidden)) {
                let mut rows = tables.iter().map(|(table, ids)| {
                    let id = ids[token] as usize;
                    &table[id * hidden..(id + 1) * hidden]
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
    on_gpu!(dy.device(), |gpu| crate::gpu::embedding::backward(&*gpu, dy, ids, dtable));
    let (dy, dtable) = (cpu::read(KERNEL, "dy", dy)?, dtable.into_host(KERNEL, "dtable")?);
    if dtable.len() > FEW * hidden {
        add(dtable, &dy, ids, hidden);
        return Ok(());
    }
    // Token types: thousands of tokens add to one row, and in single precision each addition to a large
    // sum rounds as much as the sum is large.
    let mut sum = vec![0.0; dtable.len()];
    for (dy, ids) in dy.chunks(BLOCK * hidden).zip(ids.chunks(BLOCK)) {
        sum.fill(0.0);
        add(&mut sum, dy, ids, hidden);
        dtable.iter_mut().zip(&sum).for_each(|(d, sum)| *d += sum);
    }
    Ok(())
}

/// Rows of a table that is summed in blocks.
const FEW: usize = 8;
/// Tokens of a block.
const BLOCK: usize = 64;

fn add(table: &mut [f32], dy: &[f32], ids: &[u32], hidden: usize) {
    for (dy, &id) in dy.chunks_exact(hidden).zip(ids) {
        let row = id as usize * hidden;
        for (d, &dy) in table[row..row + hidden].iter_mut().zip(dy) {
            *d += dy;
        }
    }
}

fn check(kernel: &str, table: &str, len: usize, ids: &[u32], hidden: usize) -> Result<()> {
    if hidden == 0 || !len.is_multiple_of(hidden) {
        bail!("{kernel}: {table} has {len} elements: needs [rows, {hidden}]");
    }
    let rows = len / hidden;
    if let Some(token) = ids.iter().position(|&id| id as usize >= rows) {
        bail!("{kernel}: {table} has {rows} rows, but the id at position {token} is {}", ids[token]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, testing::*};
    use candle_core::Var;
    use candle_nn::Module;

    const HIDDEN: usize = 24;

    fn ids(rows: u32, tokens: usize) -> Vec<u32> {
        (0..tokens as u32).map(|i| (i * i * 31 + i) % rows).collect()
    }

    #[test]
    fn is_its_twin() -> Result<()> {
        let tokens = 150;
        let sizes = [40usize, 7, 2];
        let tables = [0, 1, 2].map(|i| buffer(i as u64, sizes[i] * HIDDEN));
        let ids = sizes.map(|rows| ids(rows as u32, tokens));
        let arguments = [0, 1, 2].map(|i| (tables[i].view(0..tables[i].len()), ids[i].as_slice()));
        let vars = [0, 1, 2].map(|i| Var::from_tensor(&as_tensor(&tables[i], &[sizes[i], HIDDEN])).unwrap());

        let mut want = Tensor::zeros((tokens, HIDDEN), candle_core::DType::F32, &Device::Cpu)?;
        for (var, ids) in vars.iter().zip(&ids) {
            let ids = Tensor::from_slice(ids, tokens, &Device::Cpu)?;
            want = (want + candle_nn::Embedding::new(var.as_tensor().clone(), HIDDEN).forward(&ids)?)?;
        }
        assert_close("y", &values(&forward(&arguments, HIDDEN)?), &values(&want), 1e-6);

        let dy = tensor(9, &[tokens, HIDDEN]);
        let gradients = (want * &dy)?.sum_all()?.backward()?;
        for i in 0..3 {
            let mut got = Buffer::from_vec(vec![2.0; tables[i].len()], &Device::Cpu)?;
            let len = got.len();
            backward(&dy, &ids[i], got.view_mut(0..len))?;
            let want = (gradients.get(&vars[i]).unwrap() + 2.0)?;
            assert_close("dtable", &all(&got), &values(&want), TWIN);
        }
        Ok(())
    }

    #[test]
    fn gradient_is_finite_differences() -> Result<()> {
        let (table, ids, dy) = (buffer(1, 5 * HIDDEN), ids(5, 9), tensor(2, &[9, HIDDEN]));
        let mut gradient = Buffer::zeros(table.len(), &Device::Cpu)?;
        backward(&dy, &ids, gradient.view_mut(0..table.len()))?;
        check_gradient("dtable", &all(&table), &all(&gradient), |t| {
            Ok(loss(&forward(&[(View::from(t), &ids)], HIDDEN)?, &dy))
        });
        Ok(())
    }

    #[test]
    fn an_id_out_of_range_names_table_id_and_position() {
        let table = buffer(1, 5 * HIDDEN);
        let error = forward(&[(table.view(0..5 * HIDDEN), &[0, 4, 5])], HIDDEN).unwrap_err().to_string();
        assert!(error.contains("table 0 has 5 rows, but the id at position 2 is 5"), "{error}");
        assert!(forward(&[], HIDDEN).is_err());
        assert!(forward(&[(table.view(0..10), &[0])], HIDDEN).is_err());
        let two: [(View, &[u32]); 2] = [(table.view(0..HIDDEN), &[0]), (table.view(0..HIDDEN), &[0, 0])];
        assert!(forward(&two, HIDDEN).is_err());
    }
}
