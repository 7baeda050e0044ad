//! Launches of [`embedding`](crate::embedding).
use super::{Arg, Gpu, Launch, Module, operands::*};
use crate::{View, ViewMut};
use candle_core::{DType, Result, Tensor, bail};

const MODULE: Module = Module { name: "embedding", source: include_str!("../embedding.cu") };

/// Tables of one launch.
const TABLES: usize = 4;
/// Tokens of one id that a block sums one after another.
const CHUNK: usize = 64;
/// A chunk that is all of its id's.
const ALONE: u32 = u32::MAX;

/// The rows are summed in f32, and rounded once where parameters have a copy in bf16: then that is what
/// activations are.
pub(crate) fn forward(gpu: &impl Gpu, tables: &[(View, &[u32])], tokens: usize, hidden: usize) -> Result<Tensor> {
    const KERNEL: &str = "embedding::forward";
    if tables.len() > TABLES {
        bail!("{KERNEL}: {} tables: a GPU sums {TABLES} at most", tables.len());
    }
    let first = tables[0].0;
    let dtype = if first.bf16_address().is_some() { DType::BF16 } else { DType::F32 };
    let operands = Operands::new(KERNEL, first.device(), dtype)?;
    let y = operands.empty(&[tokens, hidden])?;
    let all: Vec<u32> = tables.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
    let all = operands.upload(&all)?;
    let mut aligned = vec![operands.activation("y", &y)?];
    let mut args = aligned.clone();
    for i in 0..TABLES {
        let Some((table, _)) = tables.get(i) else {
            args.extend([Arg::Pointer(0); 2]);
            continue;
        };
        let table = operands.parameter(&format!("table {i}"), *table)?;
        aligned.push(table);
        args.extend([table, operands.tensor("ids", &all.narrow(0, i * tokens, tokens)?, DType::U32)?]);
    }
    args.extend([Arg::U32(tokens as u32), Arg::U32(hidden as u32), vectors(&aligned, hidden, operands.vector())]);
    gpu.launch(&MODULE, &operands.entry("forward"), Launch::warps(tokens), &args)?;
    Ok(y)
}

pub(crate) fn backward(gpu: &impl Gpu, dy: &Tensor, ids: &[u32], mut dtable: ViewMut) -> Result<()> {
    const KERNEL: &str = "embedding::backward";
    let operands = Operands::like(KERNEL, "dy", dy)?;
    let hidden = dy.dims()[1];
    let sorted = Sorted::new(ids);
    let (chunks, shared) = (sorted.rows.len(), sorted.shared_rows.len());
    let partial = operands.empty_of(&[(sorted.slots_used as usize).max(1), hidden], DType::F32)?;
    let lists =
        [&sorted.tokens, &sorted.starts, &sorted.rows, &sorted.slots, &sorted.shared_rows, &sorted.shared_firsts];
    let device = operands.upload(&lists.iter().flat_map(|list| list.iter().copied()).collect::<Vec<_>>())?;
    let Arg::Pointer(mut at) = operands.tensor("ids", &device, DType::U32)? else { bail!("{KERNEL}: no address") };
    let [tokens, starts, rows, slots, shared_rows, shared_firsts] = lists.map(|list| {
        let start = Arg::Pointer(at);
        at += size_of_val(list.as_slice()) as u64;
        start
    });

    let (dtable, dy) = (operands.gradient("dtable", Some(&mut dtable))?, operands.activation("dy", dy)?);
    let partial = operands.tensor("partial", &partial, DType::F32)?;
    let vectors = vectors(&[dtable, dy, partial], hidden, operands.vector());
    let width = if vectors == Arg::U32(1) { operands.vector() } else { 1 };
    let hidden_arg = Arg::U32(hidden as u32);
    let args = [dtable, partial, dy, tokens, starts, rows, slots, hidden_arg, vectors];
    gpu.launch(&MODULE, &operands.entry("backward"), columns(chunks, hidden.div_ceil(width)), &args)?;
    if shared > 0 {
        let args = [dtable, partial, shared_rows, shared_firsts, hidden_arg];
        gpu.launch(&MODULE, "combine", columns(shared, hidden), &args)?;
    }
    Ok(())
}

/// Blocks `[rows, _]` of threads for each of `columns`.
fn columns(rows: usize, columns: usize) -> Launch {
    let threads = columns.next_multiple_of(32).min(256);
    Launch { grid: [rows as u32, columns.div_ceil(threads) as u32, 1], block: [threads as u32, 1, 1], shared_bytes: 0 }
}

/// Tokens by their ids, cut into chunks that are summed side by side. Their order, and so the bits of
/// the sums, depends on the ids alone.
struct Sorted {
    /// Tokens, those of one id after another.
    tokens: Vec<u32>,
    /// Where each chunk starts in `tokens`, and the last one's end.
    starts: Vec<u32>,
    /// Each chunk's id.
    rows: Vec<u32>,
    /// Where each chunk's sum goes among the partial sums, or [`ALONE`].
    slots: Vec<u32>,
    slots_used: u32,
    /// Ids that have several chunks.
    shared_rows: Vec<u32>,
    /// The first partial sum of each, and the last one's end.
    shared_firsts: Vec<u32>,
}

impl Sorted {
    fn new(ids: &[u32]) -> Self {
        let mut keys: Vec<u64> = ids.iter().zip(0u64..).map(|(&id, token)| u64::from(id) << 32 | token).collect();
        keys.sort_unstable(); // no two are equal
        let mut sorted = Self {
            tokens: keys.iter().map(|&key| key as u32).collect(),
            starts: Vec::new(),
            rows: Vec::new(),
            slots: Vec::new(),
            slots_used: 0,
            shared_rows: Vec::new(),
            shared_firsts: Vec::new(),
        };
        let mut start = 0;
        for same in keys.chunk_by(|a, b| a >> 32 == b >> 32) {
            let (id, alone) = ((same[0] >> 32) as u32, same.len() <= CHUNK);
            if !alone {
                sorted.shared_rows.push(id);
                sorted.shared_firsts.push(sorted.slots_used);
            }
            for chunk in same.chunks(CHUNK) {
                sorted.starts.push(start);
                sorted.rows.push(id);
                sorted.slots.push(if alone { ALONE } else { sorted.slots_used });
                sorted.slots_used += u32::from(!alone);
                start += chunk.len() as u32;
            }
        }
        sorted.starts.push(start);
        sorted.shared_firsts.push(sorted.slots_used);
        sorted
    }
}

#[cfg(test)]
mod tests {
    use super::super::{linear::Blas, testing::*};
    use super::*;
    use crate::{Buffer, Device, testing::*};

    gpu_tests!(is_the_cpus);

    fn is_the_cpus(case: &Case<impl Blas>) -> Result<()> {
        for (tokens, hidden) in [(1, 5), (150, 24), (600, 264)] {
            let sizes = [40usize, 7, 2, 3];
            let ids = sizes.map(|rows| (0..tokens as u32).map(|i| (i * i * 31 + i) % rows as u32).collect::<Vec<_>>());
            let host = [0, 1, 2, 3].map(|i| buffer(i as u64, sizes[i] * hidden));
            let device = host.iter().map(|table| case.parameters(table)).collect::<Result<Vec<_>>>()?;
            for n in [1, 3, 4] {
                let got: Vec<(View, &[u32])> =
                    (0..n).map(|i| (device[i].view(0..device[i].len()), &ids[i][..])).collect();
                let want: Vec<(View, &[u32])> = (0..n).map(|i| (host[i].view(0..host[i].len()), &ids[i][..])).collect();
                let (got, want) = (forward(case.gpu, &got, tokens, hidden)?, crate::embedding::forward(&want, hidden)?);
                case.close("y", &got, &want, case.tolerance(1e-6, 1.0 / 256.0)); // one rounding
            }
            let dy = case.inputs(&tensor(9, &[tokens, hidden]))?;
            for (ids, rows) in ids.iter().zip(sizes) {
                let twos = |device: &Device| Buffer::from_vec(vec![2.0; rows * hidden], device);
                let (mut got, mut want) = (twos(case.device)?, twos(&Device::Cpu)?);
                backward(case.gpu, &dy.device, ids, got.view_mut(0..rows * hidden))?;
                crate::embedding::backward(&dy.host, ids, want.view_mut(0..rows * hidden))?;
                assert_close("dtable", &all(&got), &all(&want), TWIN); // all sums are f32
            }
        }
        Ok(())
    }

    #[test]
    fn chunks_take_each_token_once() {
        let sorted = Sorted::new(&[vec![7; 130], vec![3], vec![9; 64], vec![7; 10]].concat());
        assert_eq!(sorted.rows, [3, 7, 7, 7, 9]);
        assert_eq!(sorted.starts, [0, 1, 65, 129, 141, 205]);
        assert_eq!(sorted.slots, [ALONE, 0, 1, 2, ALONE]);
        assert_eq!((sorted.shared_rows, sorted.shared_firsts), (vec![7], vec![0, 3]));
        let mut tokens = sorted.tokens;
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq(0..205));
    }
}
