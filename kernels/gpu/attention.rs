//! Launches of [`attention`](crate::attention).
use super::{Arg, Gpu, Launch, Module, operands::*};
use crate::{Dropout, Packing};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::collections::HashMap;

/// Keys that forward has in shared memory at a time, and queries or keys that backward's passes have: `attention.cu`
/// has the same.
const FORWARD_KEYS: usize = 64;
const BACKWARD_ROWS: usize = 32;

macro_rules! module {
    ($name:literal, $element:literal, $head_dim:literal, $file:literal) => {
        Module {
            name: $name,
            source: concat!("#define ELEMENT ", $element, "\n#define HEAD_DIM ", $head_dim, "\n", include_str!($file)),
        }
    };
}

/// A module for each dtype and head dimension; a lesser one takes the next.
const F32: [(usize, Module); 4] = [
    (32, module!("attention_f32_32", "float", 32, "../attention_fma.cu")),
    (64, module!("attention_f32_64", "float", 64, "../attention_fma.cu")),
    (128, module!("attention_f32_128", "float", 128, "../attention_fma.cu")),
    (256, module!("attention_f32_256", "float", 256, "../attention_fma.cu")),
];
const BF16: [(usize, Module); 4] = [
    (32, module!("attention_bf16_32", "bf16", 32, "../attention.cu")),
    (64, module!("attention_bf16_64", "bf16", 64, "../attention.cu")),
    (128, module!("attention_bf16_128", "bf16", 128, "../attention.cu")),
    (256, module!("attention_bf16_256", "bf16", 256, "../attention_fma.cu")),
];

/// Which kernels run, and how: threads and bytes of shared memory of a block.
struct Plan {
    module: &'static Module,
    /// The module's head dimension.
    dim: usize,
    /// Queries, or keys, of a block.
    tile: usize,
    forward: (usize, usize),
    backward_keys: (usize, usize),
    backward_queries: (usize, usize),
    /// Rows of k and v in forward's shared memory, where the kernels are `attention.cu`'s; their backward's pass over
    /// keys gives dq too, where a sequence is one tile.
    tensor_cores: Option<u32>,
}

impl Plan {
    fn new(kernel: &str, dtype: DType, head_dim: usize, packing: &Packing) -> Result<Self> {
        let modules: &'static [_; 4] = if dtype == DType::BF16 { &BF16 } else { &F32 };
        let found = modules.iter().find(|(most, _)| head_dim <= *most);
        let Some(&(dim, ref module)) = found.filter(|_| head_dim.is_multiple_of(8)) else {
            bail!("{kernel}: a head has {head_dim} columns: needs a multiple of 8 up to 256 on a GPU");
        };
        if dtype == DType::F32 || dim > 128 {
            let tile = if dim <= 128 { 32 } else { 16 };
            let (rows, scores) = (tile * (dim + 4), tile * (tile + 1));
            let threads = 4 * tile;
            let backward = (threads, size_of::<f32>() * (4 * rows + 2 * scores));
            return Ok(Self {
                module,
                dim,
                tile,
                forward: (threads, size_of::<f32>() * (2 * rows + scores)),
                backward_keys: backward,
                backward_queries: backward,
                tensor_cores: None,
            });
        }
        // As long as most sequences: a block of a shorter one idles, a longer one's keys are read more often.
        let mean = packing.tokens().div_ceil(packing.sequences());
        let tile = mean.next_power_of_two().clamp(32, if dim <= 64 { 128 } else { 64 });
        let threads = 2 * tile; // a warp for 16 rows
        let key_rows = packing.max_length().next_multiple_of(16).min(2 * FORWARD_KEYS);
        let bf16 = DType::BF16.size_in_bytes();
        let backward = bf16 * dim * (2 * tile + 4 * BACKWARD_ROWS);
        Ok(Self {
            module,
            dim,
            tile,
            forward: (threads, bf16 * dim * (tile + 2 * key_rows)),
            backward_keys: (threads, backward + bf16 * tile * BACKWARD_ROWS + size_of::<f32>() * 4 * BACKWARD_ROWS),
            backward_queries: (threads, backward),
            tensor_cores: Some(key_rows as u32),
        })
    }
}

/// Each block's sequence, tile of it, and the sequence's first row and end, `[blocks, 4]`: the longest sequences first,
/// whose blocks take longest.
#[derive(Clone, Debug)]
pub(crate) struct Tiles {
    table: Tensor,
    blocks: usize,
    /// How many of the first ones are of sequences of several tiles.
    of_several: usize,
}

/// The tables of a packing, by their tile: made once a batch.
pub(crate) type TilesBySize = HashMap<usize, Tiles>;

impl Tiles {
    fn new(packing: &Packing, tile: usize, device: &Device) -> Result<Self> {
        let mut order: Vec<usize> = (0..packing.sequences()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(packing.rows(i).len()));
        let mut table = Vec::new();
        let mut of_several = 0;
        for i in order {
            let rows = packing.rows(i);
            let count = rows.len().div_ceil(tile);
            table.extend((0..count).flat_map(|tile| [i, tile, rows.start, rows.end]).map(|x| x as u32));
            of_several += if count > 1 { count } else { 0 };
        }
        let blocks = table.len() / 4;
        Ok(Self { table: Tensor::from_vec(table, (blocks, 4), device)?, blocks, of_several })
    }
}

/// What all launches of one call share.
struct Call<'a> {
    plan: Plan,
    operands: Operands<'a>,
    tiles: Tiles,
    heads: usize,
    /// Whether only first tokens ask.
    firsts: bool,
    sequences: usize,
    /// A kernel's arguments from `offsets` on, but for the tiles' table.
    before_tiles: [Arg; 2],
    after_tiles: Vec<Arg>,
}

impl<'a> Call<'a> {
    fn new(
        kernel: &'static str,
        q: &'a Tensor,
        packing: &Packing,
        heads: usize,
        scale: f32,
        dropout: Option<&Dropout>,
    ) -> Result<Self> {
        let operands = Operands::like(kernel, "q", q)?;
        let (rows, hidden) = (q.dims()[0], q.dims()[1]);
        let head_dim = hidden / heads;
        let plan = Plan::new(kernel, q.dtype(), head_dim, packing)?;
        let on_device = packing.on(q.device())?;
        let tiles = {
            let mut made = on_device.tiles.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            match made.get(&plan.tile) {
                Some(tiles) => tiles.clone(),
                None => made.entry(plan.tile).or_insert(Tiles::new(packing, plan.tile, q.device())?).clone(),
            }
        };
        let firsts = rows != packing.tokens();
        let mut after_tiles =
            vec![Arg::U32(firsts.into()), Arg::U32(rows as u32), Arg::I32(head_dim as i32), Arg::F32(scale)];
        after_tiles.extend(super::dropout_args(dropout));
        let before_tiles = [
            operands.tensor("offsets", &on_device.offsets, DType::U32)?,
            operands.tensor("example_ids", &on_device.example_ids, DType::I64)?,
        ];
        Ok(Self { plan, operands, tiles, heads, firsts, sequences: packing.sequences(), before_tiles, after_tiles })
    }

    /// An activation, whose rows are read in whole vectors.
    fn activation(&self, kernel: &str, name: &str, tensor: &Tensor) -> Result<Arg> {
        match self.operands.activation(name, tensor)? {
            Arg::Pointer(address) if address % 16 != 0 => {
                bail!("{kernel}: {name} begins at {address:#x}: needs a multiple of 16 bytes")
            }
            arg => Ok(arg),
        }
    }

    /// Launches over the first `blocks` tiles, or where `firsts` over the sequences, each of which has one.
    fn launch(
        &self,
        gpu: &impl Gpu,
        kernel: &str,
        firsts: bool,
        blocks: usize,
        (threads, shared_bytes): (usize, usize),
        args: &[Arg],
    ) -> Result<()> {
        let (blocks, tiles) = match firsts {
            true => (self.sequences, Arg::Pointer(0)),
            false => (blocks, self.operands.tensor("tiles", &self.tiles.table, DType::U32)?),
        };
        let grid = [blocks as u32, self.heads as u32, 1];
        let launch = Launch { grid, block: [threads as u32, 1, 1], shared_bytes: shared_bytes as u32 };
        let args = [args, &self.before_tiles, &[tiles], &self.after_tiles].concat();
        gpu.launch(self.plan.module, kernel, launch, &args)
    }
}

/// Operands are of the shapes that [`crate::attention::forward`] checks.
pub(crate) fn forward(
    gpu: &impl Gpu,
    [q, k, v]: [&Tensor; 3],
    packing: &Packing,
    heads: usize,
    scale: f32,
    dropout: Option<&Dropout>,
) -> Result<(Tensor, Tensor)> {
    const KERNEL: &str = "attention::forward";
    let call = Call::new(KERNEL, q, packing, heads, scale, dropout)?;
    let out = call.operands.empty(q.dims())?;
    let lse = call.operands.empty_of(&[heads, q.dims()[0]], DType::F32)?;
    let mut args = vec![
        call.activation(KERNEL, "out", &out)?,
        call.operands.tensor("lse", &lse, DType::F32)?,
        call.activation(KERNEL, "q", q)?,
        call.activation(KERNEL, "k", k)?,
        call.activation(KERNEL, "v", v)?,
    ];
    args.extend(call.plan.tensor_cores.map(Arg::U32));
    call.launch(gpu, "forward", call.firsts, call.tiles.blocks, call.plan.forward, &args)?;
    Ok((out, lse))
}

/// Operands are of the shapes that [`crate::attention::backward`] checks.
#[allow(clippy::too_many_arguments)]
pub(crate) fn backward(
    gpu: &impl Gpu,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    packing: &Packing,
    heads: usize,
    scale: f32,
    dropout: Option<&Dropout>,
) -> Result<(Tensor, Tensor, Tensor)> {
    const KERNEL: &str = "attention::backward";
    let call = Call::new(KERNEL, q, packing, heads, scale, dropout)?;
    let (rows, hidden) = (q.dims()[0], q.dims()[1]);
    let dots = call.operands.empty_of(&[heads, rows], DType::F32)?;
    let [dq, dk, dv] = [call.operands.empty(q.dims())?, call.operands.empty(k.dims())?, call.operands.empty(k.dims())?];
    let dout_arg = call.activation(KERNEL, "dout", dout)?;
    let dots_arg = call.operands.tensor("dots", &dots, DType::F32)?;
    let [dq_arg, dk_arg, dv_arg] =
        [call.activation(KERNEL, "dq", &dq)?, call.activation(KERNEL, "dk", &dk)?, call.activation(KERNEL, "dv", &dv)?];
    let read = [
        call.activation(KERNEL, "q", q)?,
        call.activation(KERNEL, "k", k)?,
        call.activation(KERNEL, "v", v)?,
        dout_arg,
        call.operands.tensor("lse", lse, DType::F32)?,
        dots_arg,
    ];

    // A row of a head has as many lanes as the module's head dimension has eights.
    const THREADS: usize = 256;
    let blocks = rows.div_ceil(THREADS / (call.plan.dim / 8));
    let launch = Launch { grid: [blocks as u32, heads as u32, 1], block: [THREADS as u32, 1, 1], shared_bytes: 0 };
    let sizes = [Arg::U32(rows as u32), Arg::I32((hidden / heads) as i32)];
    let args = [&[dots_arg, call.activation(KERNEL, "out", out)?, dout_arg], &sizes[..]].concat();
    gpu.launch(call.plan.module, "dots", launch, &args)?;

    let written: &[Arg] = if call.plan.tensor_cores.is_some() { &[dq_arg, dk_arg, dv_arg] } else { &[dk_arg, dv_arg] };
    let args = [written, &read].concat();
    call.launch(gpu, "backward_keys", false, call.tiles.blocks, call.plan.backward_keys, &args)?;
    let blocks = if call.plan.tensor_cores.is_some() { call.tiles.of_several } else { call.tiles.blocks };
    if blocks > 0 {
        let args = [&[dq_arg], &read[..]].concat();
        call.launch(gpu, "backward_queries", call.firsts, blocks, call.plan.backward_queries, &args)?;
    }
    Ok((dq, dk, dv))
}

#[cfg(test)]
mod tests {
    use super::super::{linear::Blas, testing::*};
    use super::*;
    use crate::{attention, pooling, testing::*};

    const DROPOUT: Dropout = Dropout { probability: 0.2, seed: 9, step: 8, site: 7 };

    gpu_tests!(ragged_lengths, first_tokens, head_dimensions, a_sequence_sees_nothing_of_its_batch, large_scores);

    /// Forward and backward as on the CPU, of `heads` heads of `head_dim`.
    ///
    /// In bf16 the probabilities and their gradients are rounded before they are multiplied, and so are the
    /// results: each by up to 2⁻⁹ of itself, which was 0.003 of the largest out. The gradients read the rounded
    /// out, and dq and dk are differences of larger sums: 0.011. Twice that is let pass.
    fn compare(
        case: &Case<impl Blas>,
        lengths: &[u32],
        (heads, head_dim): (usize, usize),
        firsts: bool,
        dropout: Option<&Dropout>,
    ) -> Result<()> {
        let packing = packing(lengths);
        let dims = [packing.tokens(), heads * head_dim];
        let input = |stream, firsts| {
            let x = tensor(stream, &dims);
            case.inputs(&if firsts { pooling::first(&x, &packing)? } else { x })
        };
        let (q, k, v, dout) = (input(1, firsts)?, input(2, false)?, input(3, false)?, input(4, firsts)?);
        let (scale, device) = (1.0 / (head_dim as f32).sqrt(), [&q.device, &k.device, &v.device]);
        let name = format!("{lengths:?}, {heads} heads of {head_dim}, firsts {firsts}, {dropout:?}");

        let (out, lse) = forward(case.gpu, device, &packing, heads, scale, dropout)?;
        let (want, want_lse) = attention::forward(&q.host, &k.host, &v.host, &packing, heads, scale, dropout)?;
        case.close(&format!("out of {name}"), &out, &want, case.tolerance(TWIN, 1.0 / 128.0));
        assert_close(&format!("lse of {name}"), &values(&lse), &values(&want_lse), TWIN);

        let (dq, dk, dv) = backward(case.gpu, device, &out, &lse, &dout.device, &packing, heads, scale, dropout)?;
        let (q, k, v, dout) = (&q.host, &k.host, &v.host, &dout.host);
        let wants = attention::backward(q, k, v, &want, &want_lse, dout, &packing, heads, scale, dropout)?;
        // relative to the largest of all three, since for one token dq and dk are zero
        let largest = |x: &Tensor| values(x).iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        let most = [&wants.0, &wants.1, &wants.2].map(largest).into_iter().fold(0.0, f32::max);
        for (gradient, got, want) in [("dq", dq, wants.0), ("dk", dk, wants.1), ("dv", dv, wants.2)] {
            let tolerance = case.tolerance(TWIN, 1.0 / 50.0) * most / largest(&want);
            case.close(&format!("{gradient} of {name}"), &got, &want, tolerance);
        }
        Ok(())
    }

    /// Sequences of one tile and of several, where tiles are of 32, 64 and 128.
    const BATCHES: [&[u32]; 5] = [
        &[1, 2, 15, 16, 17, 20, 32],
        &[1, 2, 65, 33, 5],
        &[1, 2, 15, 16, 17, 63, 64, 65, 128, 200],
        &[128, 65, 300, 127],
        &[1],
    ];

    fn ragged_lengths(case: &Case<impl Blas>) -> Result<()> {
        for lengths in BATCHES {
            compare(case, lengths, (2, 64), false, None)?;
            compare(case, lengths, (1, 64), false, Some(&DROPOUT))?;
        }
        Ok(())
    }

    fn first_tokens(case: &Case<impl Blas>) -> Result<()> {
        for lengths in BATCHES {
            compare(case, lengths, (2, 64), true, Some(&DROPOUT))?;
        }
        Ok(())
    }

    fn head_dimensions(case: &Case<impl Blas>) -> Result<()> {
        for head_dim in [8, 24, 32, 40, 80, 128, 136, 256] {
            compare(case, &[17, 1, 70], (2, head_dim), false, Some(&DROPOUT))?;
            compare(case, &[130, 70], (1, head_dim), head_dim % 3 == 0, None)?;
        }
        let error = compare(case, &[3], (1, 12), false, None).unwrap_err().to_string();
        assert!(
            error.contains("attention::forward: a head has 12 columns: needs a multiple of 8 up to 256"),
            "{error}"
        );
        assert!(compare(case, &[3], (1, 264), false, None).is_err());
        Ok(())
    }

    /// The same example alone and between shorter ones: the same bits, though tiles are of 128 and of 32.
    fn a_sequence_sees_nothing_of_its_batch(case: &Case<impl Blas>) -> Result<()> {
        let run = |packing: Packing, start: usize| {
            let input = |stream| case.inputs(&tensor(stream, &[200, 64]).narrow(0, 10 - start, packing.tokens())?);
            let (q, k, v, dout) = (input(1)?, input(2)?, input(3)?, input(4)?);
            let (device, dropout) = ([&q.device, &k.device, &v.device], Some(&DROPOUT));
            let (out, lse) = forward(case.gpu, device, &packing, 1, 0.125, dropout)?;
            let (dq, dk, dv) = backward(case.gpu, device, &out, &lse, &dout.device, &packing, 1, 0.125, dropout)?;
            let cut = |x: Tensor| Ok(values(&x.to_dtype(DType::F32)?.narrow(0, start, 130)?));
            [out, dq, dk, dv].into_iter().map(cut).collect::<Result<Vec<_>>>()
        };
        let alone = run(Packing::new(vec![0, 130], vec![77])?, 0)?;
        let between = run(Packing::new(vec![0, 10, 140, 141, 142, 143, 144], vec![5, 77, 1, 2, 3, 4])?, 10)?;
        assert_eq!(alone, between);
        Ok(())
    }

    /// Scores so far apart that most probabilities vanish, and sums that overflow without their maximum: scores of
    /// both signs, and all below zero, where the rows past a sequence's end would have the largest.
    fn large_scores(case: &Case<impl Blas>) -> Result<()> {
        let packing = packing(&[70, 150]);
        let large = |stream| tensor(stream, &[220, 64]) * 100.0;
        for (q, k) in [(large(1)?, large(2)?), (large(1)?.abs()?, large(2)?.abs()?.neg()?)] {
            let (q, k, v) = (case.inputs(&q)?, case.inputs(&k)?, case.inputs(&large(3)?)?);
            let device = [&q.device, &k.device, &v.device];
            let (out, lse) = forward(case.gpu, device, &packing, 1, 1.0, None)?;
            let (want, _) = attention::forward(&q.host, &k.host, &v.host, &packing, 1, 1.0, None)?;
            case.close("out", &out, &want, 1.0 / 16.0); // rounding a score changes much
            let (dq, dk, dv) = backward(case.gpu, device, &out, &lse, &out, &packing, 1, 1.0, None)?;
            for gradient in [dq, dk, dv] {
                assert!(values(&gradient.to_dtype(DType::F32)?).iter().all(|x| x.is_finite()));
            }
        }
        Ok(())
    }
}
