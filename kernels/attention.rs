//! Softmax attention inside each sequence of a packed batch: `softmax(scale·q·kᵀ)·v` for each head.
//!
//! There is no padding and no mask: a sequence's tokens see one another and nothing else. Scores
//! are made for a few queries at a time in a scratch that stays in cache, and only the logarithm
//! of each softmax's sum is kept: backward makes the probabilities again from it (Dao et al. 2022).
//! A task is one head of one sequence, on one thread; on a GPU, a tile of it, on one block
//! (`attention.cu`: bf16 on the tensor cores; `attention_fma.cu`: f32).
use crate::{
    Dropout, Packing, cpu,
    device::on_gpu,
    dropout::Mask,
    simd, threads,
    tile::{Product, Start, WIDTH},
};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use std::{cell::RefCell, mem::MaybeUninit};

/// Queries whose scores lie in the scratch at a time.
const QUERIES: usize = 48;

thread_local! {
    /// A task's rows, scores and gradients.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `k`, `v` `[tokens, heads * head_dim]` and `q`, the same or `[sequences, heads * head_dim]`: then
/// only each sequence's first token asks → the output of `q`'s shape, and the logarithm of each
/// softmax's sum, `[heads, rows of q]`. Dropout falls on the probabilities; the first token's are
/// dropped alike in both forms.
///
/// # Errors
/// Where shapes do not fit, the scale is not above 0 or the dropout probability is not in `[0, 1)`; on a
/// GPU, where `head_dim` is not a multiple of 8 up to 256.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    packing: &Packing,
    heads: usize,
    scale: f32,
    dropout: Option<&Dropout>,
) -> Result<(Tensor, Tensor)> {
    const KERNEL: &str = "attention::forward";
    let shape = Shape::new(KERNEL, [("q", q)], [("k", k), ("v", v)], packing, heads, scale, dropout)?;
    on_gpu!(q.device(), |gpu| crate::gpu::attention::forward(&*gpu, [q, k, v], packing, heads, scale, dropout));
    let (q_data, k_data, v_data) = (cpu::read(KERNEL, "q", q)?, cpu::read(KERNEL, "k", k)?, cpu::read(KERNEL, "v", v)?);
    let (q_data, k_data, v_data) = (&*q_data, &*k_data, &*v_data);
    let mut out = cpu::uninit(q_data.len());
    let mut lse = cpu::uninit(heads * shape.queries);
    let (out_data, lse_data) = (Shared::new(&mut out), Shared::new(&mut lse));
    shape.for_each_task(packing, dropout, |task| {
        let (q, k, v) = (&q_data[task.query..], &k_data[task.key..], &v_data[task.key..]);
        // SAFETY: tasks are the heads of the sequences, and write their own part of out and lse.
        unsafe { task.forward(q, k, v, out_data.at(task.query), lse_data.range(task.lse, task.queries), scale) };
    });
    // SAFETY: the tasks are all heads of all sequences, and wrote all their rows.
    unsafe { Ok((cpu::tensor(out, q.dims(), q)?, cpu::tensor(lse, &[heads, shape.queries], q)?)) }
}

/// `out` and `lse` as [`forward`] gave them and `dout` of `out`'s shape → the gradients of `q`, `k`
/// and `v`.
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)]
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    packing: &Packing,
    heads: usize,
    scale: f32,
    dropout: Option<&Dropout>,
) -> Result<(Tensor, Tensor, Tensor)> {
    const KERNEL: &str = "attention::backward";
    let queries = [("q", q), ("out", out), ("dout", dout)];
    let shape = Shape::new(KERNEL, queries, [("k", k), ("v", v)], packing, heads, scale, dropout)?;
    cpu::check_dims(KERNEL, "lse", lse, &[heads, shape.queries], "[heads, rows of q]")?;
    on_gpu!(q.device(), |gpu| {
        crate::gpu::attention::backward(&*gpu, [q, k, v], out, lse, dout, packing, heads, scale, dropout)
    });
    let (q_data, k_data, v_data) = (cpu::read(KERNEL, "q", q)?, cpu::read(KERNEL, "k", k)?, cpu::read(KERNEL, "v", v)?);
    let (q_data, k_data, v_data) = (&*q_data, &*k_data, &*v_data);
    let (out, dout, lse) =
        (cpu::read(KERNEL, "out", out)?, cpu::read(KERNEL, "dout", dout)?, cpu::read(KERNEL, "lse", lse)?);
    let (out, dout, lse) = (&*out, &*dout, &*lse);
    let mut dq = cpu::uninit(q_data.len());
    let [mut dk, mut dv] = [(); 2].map(|()| cpu::uninit(k_data.len()));
    let (dq_data, dk_data, dv_data) = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
    shape.for_each_task(packing, dropout, |task| {
        let saved = Saved {
            q: &q_data[task.query..],
            k: &k_data[task.key..],
            v: &v_data[task.key..],
            out: &out[task.query..],
            dout: &dout[task.query..],
            lse: &lse[task.lse..task.lse + task.queries],
        };
        // SAFETY: tasks are the heads of the sequences, and write their own part of dq, dk and dv.
        unsafe { task.backward(saved, dq_data.at(task.query), dk_data.at(task.key), dv_data.at(task.key), scale) };
    });
    // SAFETY: the tasks are all heads of all sequences, and wrote all their rows.
    unsafe { Ok((cpu::tensor(dq, q.dims(), q)?, cpu::tensor(dk, k.dims(), q)?, cpu::tensor(dv, k.dims(), q)?)) }
}

/// Sizes that all tasks share.
#[derive(Clone, Copy)]
struct Shape {
    /// Rows of `q`: as many as tokens, or as sequences.
    queries: usize,
    tokens: usize,
    heads: usize,
    hidden: usize,
    head_dim: usize,
}

impl Shape {
    fn new<const N: usize>(
        kernel: &str,
        queries: [(&str, &Tensor); N],
        keys: [(&str, &Tensor); 2],
        packing: &Packing,
        heads: usize,
        scale: f32,
        dropout: Option<&Dropout>,
    ) -> Result<Self> {
        let (name, q) = queries[0];
        let (rows, hidden) = cpu::matrix(kernel, name, q)?;
        let tokens = packing.tokens();
        if rows != tokens && rows != packing.sequences() {
            let sequences = packing.sequences();
            bail!("{kernel}: {name} has {rows} rows: needs the packing's {tokens} tokens or {sequences} sequences");
        }
        for (name, tensor) in &queries[1..] {
            cpu::check_dims(kernel, name, tensor, q.dims(), queries[0].0)?;
        }
        for (name, tensor) in keys {
            cpu::check_dims(kernel, name, tensor, &[tokens, hidden], "[tokens, heads * head_dim]")?;
        }
        if heads == 0 || hidden == 0 || hidden % heads != 0 {
            bail!("{kernel}: {name} has {hidden} columns: needs a multiple of heads = {heads}");
        }
        if !(scale > 0.0 && scale.is_finite()) {
            bail!("{kernel}: scale = {scale}: needs to be above 0");
        }
        if let Some(dropout) = dropout {
            dropout.check(kernel)?;
        }
        Ok(Self { queries: rows, tokens, heads, hidden, head_dim: hidden / heads })
    }

    fn for_each_task(self, packing: &Packing, dropout: Option<&Dropout>, f: impl Fn(Task) + Sync) {
        threads::install(|| {
            (0..packing.sequences() * self.heads).into_par_iter().with_max_len(1).for_each(|i| {
                let (sequence, head) = (i / self.heads, i % self.heads);
                let keys = packing.rows(sequence);
                let queries = if self.queries == self.tokens { keys.clone() } else { sequence..sequence + 1 };
                f(Task {
                    shape: self,
                    head,
                    queries: queries.len(),
                    keys: keys.len(),
                    query: queries.start * self.hidden + head * self.head_dim,
                    key: keys.start * self.hidden + head * self.head_dim,
                    lse: head * self.queries + queries.start,
                    mask: dropout.map_or(Mask::NONE, |d| d.mask(packing.example_ids()[sequence])),
                });
            });
        });
    }
}

/// One head of one sequence.
#[derive(Clone, Copy)]
struct Task {
    shape: Shape,
    head: usize,
    queries: usize,
    keys: usize,
    /// Where its first row starts in `q`; rows are `shape.hidden` apart.
    query: usize,
    /// Where its first row starts in `k` and `v`.
    key: usize,
    /// Where its first row is in `lse`.
    lse: usize,
    mask: Mask,
}

struct Saved<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    dout: &'a [f32],
    lse: &'a [f32],
}

// Rows of one head lie far apart, on few lines of the first-level cache: what is read more than
// once is gathered first, and what is written more than once is scattered last.
impl Task {
    /// # Safety
    /// `out` points to this task's first row, whose rows nobody else uses.
    unsafe fn forward(self, q: &[f32], k: &[f32], v: &[f32], out: *mut f32, lse: &mut [MaybeUninit<f32>], scale: f32) {
        let Shape { hidden, head_dim, .. } = self.shape;
        let width = self.keys.next_multiple_of(WIDTH);
        let block = QUERIES.min(self.queries);
        let sizes = [head_dim * width, self.keys * head_dim, block * width, block * head_dim];
        with_scratch(sizes, |[keys, values, scores, outs]| {
            transpose(keys, k, hidden, self.keys, width);
            gather(values, v, hidden, head_dim);
            for first in (0..self.queries).step_by(QUERIES) {
                let queries = QUERIES.min(self.queries - first);
                let (scores, outs) = (&mut scores[..queries * width], &mut outs[..queries * head_dim]);
                let mut sums = [0.0; QUERIES];
                let sums = &mut sums[..queries];
                let lse = &mut lse[first..first + queries];
                // SAFETY: each part of the scratch has the size that its product takes; q reaches as
                // far as this task's rows, out too by the caller's promise.
                unsafe {
                    product(
                        queries,
                        width,
                        head_dim,
                        (q[first * hidden..].as_ptr(), hidden, 1),
                        keys,
                        scores,
                        Start::Zero,
                    );
                    softmax(scores, width, self.keys, scale, self.mask, self.element(first), lse, sums);
                    product(queries, head_dim, self.keys, (scores.as_ptr(), width, 1), values, outs, Start::Zero);
                    divide(outs, sums);
                    scatter(out.add(first * hidden), outs, hidden, head_dim);
                }
            }
        });
    }

    /// # Safety
    /// `dq`, `dk` and `dv` point to this task's first row, whose rows nobody else uses.
    unsafe fn backward(self, saved: Saved, dq: *mut f32, dk: *mut f32, dv: *mut f32, scale: f32) {
        let Saved { q, k, v, out, dout, lse } = saved;
        let Shape { hidden, head_dim, .. } = self.shape;
        let width = self.keys.next_multiple_of(WIDTH);
        let block = QUERIES.min(self.queries);
        let (across, along) = (head_dim * width, self.keys * head_dim);
        let (wide, narrow) = (block * width, block * head_dim);
        let sizes = [across, across, along, along, along, wide, wide, narrow, narrow, narrow];
        with_scratch(sizes, |[keys_t, values_t, keys, dkeys, dvalues, scores, dscores, qs, douts, outs]| {
            transpose(keys_t, k, hidden, self.keys, width);
            transpose(values_t, v, hidden, self.keys, width);
            gather(keys, k, hidden, head_dim);
            for first in (0..self.queries).step_by(QUERIES) {
                let queries = QUERIES.min(self.queries - first);
                let (scores, dscores) = (&mut scores[..queries * width], &mut dscores[..queries * width]);
                let [qs, douts, outs] = [&mut *qs, &mut *douts, &mut *outs].map(|part| &mut part[..queries * head_dim]);
                gather(qs, &q[first * hidden..], hidden, head_dim);
                gather(douts, &dout[first * hidden..], hidden, head_dim);
                gather(outs, &out[first * hidden..], hidden, head_dim);
                let mut dots = [0.0; QUERIES]; // out·dout, which is Σ p·dp of each softmax
                let dots = &mut dots[..queries];
                dot(dots, outs, douts);
                let (lse, start) = (&lse[first..first + queries], if first > 0 { Start::Sum } else { Start::Zero });
                // SAFETY: each part of the scratch has the size that its product takes; dq reaches as
                // far as this task's rows by the caller's promise.
                unsafe {
                    product(queries, width, head_dim, (qs.as_ptr(), head_dim, 1), keys_t, scores, Start::Zero);
                    product(queries, width, head_dim, (douts.as_ptr(), head_dim, 1), values_t, dscores, Start::Zero);
                    let element = self.element(first);
                    softmax_backward(scores, dscores, width, self.keys, scale, self.mask, element, lse, dots);
                    product(queries, head_dim, self.keys, (dscores.as_ptr(), width, 1), keys, outs, Start::Zero);
                    scatter(dq.add(first * hidden), outs, hidden, head_dim);
                    product(self.keys, head_dim, queries, (dscores.as_ptr(), 1, width), qs, dkeys, start);
                    product(self.keys, head_dim, queries, (scores.as_ptr(), 1, width), douts, dvalues, start);
                }
            }
            // SAFETY: both reach as far as this task's rows, by the caller's promise.
            unsafe {
                scatter(dk, dkeys, hidden, head_dim);
                scatter(dv, dvalues, hidden, head_dim);
            }
        });
    }

    /// The number, in its example, of the probability of query `first` and key 0.
    fn element(self, first: usize) -> usize {
        (self.head * self.keys + first) * self.keys
    }
}

/// `c` `[m, n]` = `start + a·b` for `b` `[k, n]`, and `a` by pointer and the strides of its rows and
/// columns.
///
/// # Safety
/// `a` is `[m, k]`; where the sum starts from `c`, it is initialised.
unsafe fn product(
    m: usize,
    n: usize,
    k: usize,
    (a, a_row, a_column): (*const f32, usize, usize),
    b: &[f32],
    c: &mut [f32],
    start: Start,
) {
    debug_assert!(b.len() >= k * n && c.len() >= m * n);
    // SAFETY: the caller's promise, and the sizes of b and c.
    unsafe {
        Product { m, n, k, a, a_row, a_column, b: b.as_ptr(), b_row: n, c: c.as_mut_ptr(), c_row: n, start }.run()
    };
}

simd::vectorized! {
    /// `[rows, columns]`, whose rows are `stride` apart → one after another.
    fn gather(to: &mut [f32], from: &[f32], stride: usize, columns: usize) {
        for (to, from) in to.chunks_exact_mut(columns).zip(from.chunks(stride)) {
            to.copy_from_slice(&from[..columns]);
        }
    }
}

/// Rows of `from` → `stride` apart.
///
/// # Safety
/// There are as many rows at `to`, and nobody else uses them.
unsafe fn scatter(to: *mut f32, from: &[f32], stride: usize, columns: usize) {
    for (row, from) in from.chunks_exact(columns).enumerate() {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.add(row * stride), columns) };
    }
}

simd::vectorized! {
    /// `rows` rows, `stride` apart → `[columns, width]`, with zeros past the rows.
    fn transpose(to: &mut [f32], from: &[f32], stride: usize, rows: usize, width: usize) {
        for (block, to) in to.chunks_mut(simd::LANES * width).enumerate() {
            for (row, from) in from.chunks(stride).take(rows).enumerate() {
                let from = &from[block * simd::LANES..];
                for (to, &x) in to.chunks_exact_mut(width).zip(from) {
                    to[row] = x;
                }
            }
            to.chunks_exact_mut(width).for_each(|to| to[rows..].fill(0.0));
        }
    }
}

simd::vectorized! {
    /// Divides each row by its sum.
    fn divide(rows: &mut [f32], sums: &[f32]) {
        for (row, sum) in rows.chunks_exact_mut(rows.len() / sums.len()).zip(sums) {
            row.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

simd::vectorized! {
    /// `a·b` of each row.
    fn dot(dots: &mut [f32], a: &[f32], b: &[f32]) {
        let columns = a.len() / dots.len();
        for ((dot, a), b) in dots.iter_mut().zip(a.chunks_exact(columns)).zip(b.chunks_exact(columns)) {
            *dot = simd::sum(a, b, |a, b| a * b);
        }
    }
}

simd::vectorized! {
    /// Rows of scores become masked exponentials; the unmasked ones' sums go to `sums`.
    fn softmax(
        scores: &mut [f32],
        width: usize,
        length: usize,
        scale: f32,
        mask: Mask,
        first: usize,
        lse: &mut [MaybeUninit<f32>],
        sums: &mut [f32],
    ) {
        for (row, (lse, total)) in lse.iter_mut().zip(sums).enumerate() {
            let scores = &mut scores[row * width..][..length];
            let max = scale * max(scores);
            for s in &mut *scores {
                *s = simd::exp(s.mul_add(scale, -max));
            }
            *total = simd::sum(scores, scores, |s, _| s);
            lse.write(max + total.ln());
            mask.apply(scores, first + row * length);
        }
    }
}

#[inline(always)]
fn max(x: &[f32]) -> f32 {
    let mut lanes = [x[0]; simd::LANES];
    let (whole, rest) = x.as_chunks::<{ simd::LANES }>();
    for x in whole {
        for lane in 0..simd::LANES {
            lanes[lane] = if x[lane] > lanes[lane] { x[lane] } else { lanes[lane] };
        }
    }
    lanes.iter().chain(rest).fold(x[0], |max, &x| max.max(x))
}

simd::vectorized! {
    /// Rows of scores become masked probabilities, rows of `dscores` (first those of the masked
    /// probabilities) the gradient of `q·kᵀ`.
    fn softmax_backward(
        scores: &mut [f32],
        dscores: &mut [f32],
        width: usize,
        length: usize,
        scale: f32,
        mask: Mask,
        first: usize,
        lse: &[f32],
        dots: &[f32],
    ) {
        for (row, (&lse, &dot)) in lse.iter().zip(dots).enumerate() {
            let first = first + row * length;
            let scores = &mut scores[row * width..][..length];
            let dscores = &mut dscores[row * width..][..length];
            for (i, (s, d)) in scores.iter_mut().zip(dscores).enumerate() {
                let p = simd::exp(s.mul_add(scale, -lse));
                let factor = if mask.drops() { mask.factor((first + i) as u32) } else { 1.0 };
                *d = scale * p * d.mul_add(factor, -dot);
                *s = p * factor;
            }
        }
    }
}

/// Runs `f` with this thread's scratch, cut into parts.
fn with_scratch<const N: usize>(sizes: [usize; N], f: impl FnOnce([&mut [f32]; N])) {
    SCRATCH.with_borrow_mut(|scratch| {
        let total = sizes.iter().sum();
        if scratch.len() < total {
            scratch.resize(total, 0.0);
        }
        let mut rest = scratch.as_mut_slice();
        f(sizes.map(|size| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(size);
            rest = after;
            part
        }));
    });
}

/// Memory that tasks write in parts of their own.
#[derive(Clone, Copy)]
struct Shared {
    data: *mut MaybeUninit<f32>,
}

// SAFETY: whoever reaches into it promises that parts do not overlap.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(data: &mut [MaybeUninit<f32>]) -> Self {
        Self { data: data.as_mut_ptr() }
    }

    /// # Safety
    /// `offset` is within the memory.
    unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.data.add(offset).cast() }
    }

    /// # Safety
    /// The part is within the memory, and nobody else uses it meanwhile.
    unsafe fn range<'a>(self, offset: usize, len: usize) -> &'a mut [MaybeUninit<f32>] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(offset), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use candle_core::{D, Device, Var};
    use proptest::prelude::*;

    const DROPOUT: Dropout = Dropout { probability: 0.2, seed: 9, step: 8, site: 7 };

    struct Case {
        packing: Packing,
        heads: usize,
        dropout: Option<Dropout>,
        inputs: [Tensor; 3],
        dout: Tensor,
    }

    impl Case {
        fn new(lengths: &[u32], heads: usize, head_dim: usize, dropout: Option<Dropout>) -> Self {
            let packing = packing(lengths);
            let dims = [packing.tokens(), heads * head_dim];
            let inputs = [1, 2, 3].map(|stream| tensor(stream, &dims));
            Case { packing, heads, dropout, inputs, dout: tensor(4, &dims) }
        }

        fn scale(&self) -> f32 {
            1.0 / ((self.inputs[0].dims()[1] / self.heads) as f32).sqrt()
        }

        fn forward(&self) -> Result<(Tensor, Tensor)> {
            let [q, k, v] = &self.inputs;
            forward(q, k, v, &self.packing, self.heads, self.scale(), self.dropout.as_ref())
        }

        fn backward(&self) -> Result<[Tensor; 3]> {
            let [q, k, v] = &self.inputs;
            let (out, lse) = self.forward()?;
            let dropout = self.dropout.as_ref();
            let (packing, heads, scale) = (&self.packing, self.heads, self.scale());
            let (dq, dk, dv) = backward(q, k, v, &out, &lse, &self.dout, packing, heads, scale, dropout)?;
            Ok([dq, dk, dv])
        }

        /// Each head of each sequence on its own, in candle's ops.
        fn twin(&self, [q, k, v]: [&Tensor; 3]) -> Result<(Tensor, Tensor)> {
            let (mut out, mut lse) = (Vec::new(), Vec::new());
            for sequence in 0..self.packing.sequences() {
                let rows = self.packing.rows(sequence);
                let part = |x: &Tensor| {
                    let x = x.narrow(0, rows.start, rows.len())?;
                    x.reshape((rows.len(), self.heads, ()))?.transpose(0, 1)?.contiguous() // [heads, length, head_dim]
                };
                let scores = (part(q)?.matmul(&part(k)?.t()?.contiguous()?)? * f64::from(self.scale()))?;
                lse.push(scores.log_sum_exp(D::Minus1)?); // [heads, length]
                let mut p = candle_nn::ops::softmax(&scores, D::Minus1)?;
                if let Some(dropout) = self.dropout {
                    let mask = dropout.mask(self.packing.example_ids()[sequence]);
                    let factors: Vec<f32> = (0..p.elem_count()).map(|e| mask.factor(e as u32)).collect();
                    p = (&p * Tensor::from_vec(factors, p.dims(), &Device::Cpu)?)?;
                }
                out.push(p.matmul(&part(v)?)?.transpose(0, 1)?.flatten_from(1)?);
            }
            Ok((Tensor::cat(&out, 0)?, Tensor::cat(&lse, 1)?))
        }

        fn is_its_twin(&self) -> Result<()> {
            let vars = self.inputs.clone().map(|t| Var::from_tensor(&t).unwrap());
            let (want, want_lse) = self.twin([&vars[0], &vars[1], &vars[2]])?;
            let (out, lse) = self.forward()?;
            assert_close("out", &values(&out), &values(&want), TWIN);
            assert_close("lse", &values(&lse), &values(&want_lse), TWIN);
            let twin = (want * &self.dout)?.sum_all()?.backward()?;
            // Side by side, since dq and dk are differences of sums as large as dv: zero, for one token.
            let all = |gradients: [&Tensor; 3]| gradients.iter().flat_map(|g| values(g)).collect::<Vec<_>>();
            let [dq, dk, dv] = self.backward()?;
            let want = [0, 1, 2].map(|i| twin.get(&vars[i]).unwrap());
            assert_close("dq, dk, dv", &all([&dq, &dk, &dv]), &all(want), TWIN);
            Ok(())
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn is_its_twin(
            lengths in prop::collection::vec(1u32..120, 1..5),
            heads in 1usize..4,
            head_dim in 1usize..70,
            dropout: bool,
        ) {
            Case::new(&lengths, heads, head_dim, dropout.then_some(DROPOUT)).is_its_twin().unwrap();
        }
    }

    #[test]
    fn is_its_twin_for_single_tokens_and_long_texts() -> Result<()> {
        Case::new(&[1, 300, 1, 1, 47, 48, 49, 96], 2, 32, None).is_its_twin()?;
        Case::new(&[1], 1, 1, None).is_its_twin()?;
        Case::new(&[1, 1], 3, 7, Some(DROPOUT)).is_its_twin()?;
        Case::new(&[1, 300, 1, 1, 47, 48, 49, 96], 2, 64, Some(DROPOUT)).is_its_twin()
    }

    #[test]
    fn gradients_are_finite_differences() -> Result<()> {
        for dropout in [None, Some(DROPOUT)] {
            let case = Case::new(&[1, 4, 3], 2, 3, dropout);
            for (i, gradient) in case.backward()?.iter().enumerate() {
                check_gradient(["dq", "dk", "dv"][i], &values(&case.inputs[i]), &values(gradient), |x| {
                    let mut case = Case::new(&[1, 4, 3], 2, 3, dropout);
                    case.inputs[i] = Tensor::from_slice(x, case.inputs[i].dims(), &Device::Cpu)?;
                    Ok(loss(&case.forward()?.0, &case.dout))
                });
            }
        }
        Ok(())
    }

    /// The same example alone and between others: the same bits, dropout included.
    #[test]
    fn a_sequence_sees_nothing_of_its_batch() -> Result<()> {
        let batch = Case::new(&[5, 50, 9], 2, 16, Some(DROPOUT));
        let rows = batch.packing.rows(1);
        let cut = |x: &Tensor| x.narrow(0, rows.start, rows.len()).unwrap().copy().unwrap();
        let alone = Case {
            packing: Packing::new(vec![0, 50], vec![batch.packing.example_ids()[1]])?,
            inputs: batch.inputs.clone().map(|x| cut(&x)),
            dout: cut(&batch.dout),
            heads: batch.heads,
            dropout: batch.dropout,
        };
        assert_eq!(values(&cut(&batch.forward()?.0)), values(&alone.forward()?.0));
        for (together, alone) in batch.backward()?.iter().zip(alone.backward()?) {
            assert_eq!(values(&cut(together)), values(&alone));
        }
        Ok(())
    }

    /// First tokens that ask alone: the same bits, dropout included, and the gradients of a `dout`
    /// that is zero elsewhere.
    #[test]
    fn first_tokens_may_ask_alone() -> Result<()> {
        let case = Case::new(&[5, 50, 1, 9], 2, 16, Some(DROPOUT));
        let [q, k, v] = &case.inputs;
        let firsts = |x: &Tensor| crate::pooling::first(x, &case.packing);
        let ask = |q: &Tensor| forward(q, k, v, &case.packing, 2, case.scale(), case.dropout.as_ref());
        let (out, lse) = ask(&firsts(q)?)?;
        assert_eq!(values(&out), values(&firsts(&ask(q)?.0)?));

        let dout = firsts(&case.dout)?;
        let packing = &case.packing;
        let dropout = case.dropout.as_ref();
        let (dq, dk, dv) = backward(&firsts(q)?, k, v, &out, &lse, &dout, packing, 2, case.scale(), dropout)?;
        let (out, lse) = ask(q)?;
        let dout = crate::pooling::first_backward(&dout, packing)?;
        let (all_dq, all_dk, all_dv) = backward(q, k, v, &out, &lse, &dout, packing, 2, case.scale(), dropout)?;
        assert_eq!(values(&dq), values(&firsts(&all_dq)?));
        assert_close("dk", &values(&dk), &values(&all_dk), 1e-6);
        assert_close("dv", &values(&dv), &values(&all_dv), 1e-6);
        Ok(())
    }

    #[test]
    fn large_scores_overflow_nothing() -> Result<()> {
        let mut case = Case::new(&[7], 1, 8, None);
        case.inputs = case.inputs.map(|x| (x * 100.0).unwrap());
        let (out, _) = case.forward()?;
        assert_close("out", &values(&out), &values(&case.twin(case.inputs.each_ref())?.0), 1e-3);
        assert!(case.backward()?.iter().all(|g| values(g).iter().all(|x| x.is_finite())));
        Ok(())
    }

    #[test]
    fn refuses_shapes_that_do_not_fit() {
        let case = Case::new(&[3, 2], 2, 4, None);
        let [q, k, v] = &case.inputs;
        assert!(forward(q, k, v, &case.packing, 3, 1.0, None).is_err());
        assert!(forward(q, k, v, &packing(&[3, 3]), 2, 1.0, None).is_err());
        assert!(forward(q, k, v, &case.packing, 2, 0.0, None).is_err());
        let short = tensor(1, &[4, 8]);
        let error = forward(q, &short, v, &case.packing, 2, 1.0, None).unwrap_err().to_string();
        assert!(error.contains("attention::forward: k has shape [4, 8]: needs [5, 8]"), "{error}");
    }
}
