//! Each fused kernel beside its plain twin in candle's own ops, at the sizes of a MiniLM step (16×128
//! tokens), forward and backward, on all cores.
//!
//! ```sh
//! cargo bench --bench kernels [FILTER]
//! ```
//! The two are timed in turns; medians are shown. GFLOP/s stand against the rate of the largest bare
//! product, GB/s (of what a kernel has to read and write at least) against a copy of a large array.

use std::time::Instant;

use anyhow::Result;
use candle_core::{D, Var};
use kiln_kernels::{
    Buffer, DType, Device, Dropout, Grad, Packing, Tensor, adamw, attention, embedding, gelu, init, layer_norm, linear,
    norm, threads,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 9;
const DROPOUT: Dropout = Dropout { probability: 0.1, seed: 1, step: 2, site: 3 };

/// What a kernel's time is measured by.
#[derive(Clone, Copy)]
enum Work {
    Flops(f64),
    Bytes(f64),
}

/// This machine's rates.
struct Peak {
    flops: f64,
    bytes: f64,
}

/// Median seconds of each of some functions, called in turns after one call each to warm up.
fn in_turns<const N: usize>(mut functions: [&mut dyn FnMut() -> Result<()>; N]) -> Result<[f64; N]> {
    let mut seconds = [(); N].map(|()| Vec::with_capacity(ROUNDS));
    for round in 0..=ROUNDS {
        for (f, seconds) in functions.iter_mut().zip(&mut seconds) {
            let started = Instant::now();
            f()?;
            if round > 0 {
                seconds.push(started.elapsed().as_secs_f64());
            }
        }
    }
    Ok(seconds.map(|mut s| {
        s.sort_by(f64::total_cmp);
        s[s.len() / 2]
    }))
}

/// What a kernel gave is dropped within its time.
fn discard<T, E: Into<anyhow::Error>>(result: std::result::Result<T, E>) -> Result<()> {
    result.map(drop).map_err(Into::into)
}

fn random(stream: u64, dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(init::normal(1, stream, dims.iter().product(), 1.0), dims, &Device::Cpu)?)
}

fn buffer(stream: u64, len: usize, std: f64) -> Result<Buffer> {
    Ok(Buffer::from_vec(init::normal(2, stream, len, std), &Device::Cpu)?)
}

fn var(buffer: &Buffer, dims: &[usize]) -> Result<Var> {
    Ok(Var::from_tensor(&Tensor::from_vec(buffer.read(0..buffer.len())?, dims, &Device::Cpu)?)?)
}

struct Report {
    filter: String,
    peak: Peak,
}

impl Report {
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    fn line(&self, name: &str, work: Work, [kernel, twin]: [f64; 2]) {
        let (rate, unit, share) = match work {
            Work::Flops(flops) => (flops / kernel / 1e9, "GFLOP/s", flops / kernel / self.peak.flops),
            Work::Bytes(bytes) => (bytes / kernel / 1e9, "GB/s", bytes / kernel / self.peak.bytes),
        };
        println!(
            "| {name} | {:.2} | {:.2} | {:.1}× | {rate:.0} {unit} | {:.0} % |",
            1e3 * kernel,
            1e3 * twin,
            twin / kernel,
            100.0 * share
        );
    }
}

fn main() -> Result<()> {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    threads::set(cores)?;
    let peak = peak()?;
    println!("{cores} threads; bare product {:.0} GFLOP/s, copy {:.1} GB/s\n", peak.flops / 1e9, peak.bytes / 1e9);
    println!("| kernel | ms | plain twin, ms | ratio | rate | of the peak |\n|---|---|---|---|---|---|");
    let report = Report { filter, peak };
    let (rows, hidden, inner, heads) = (2048, 384, 1536, 12);
    let packing = Packing::new((0..=16).map(|i| i * 128).collect(), (0..16).collect())?;
    for (name, input, output) in [("384→384", hidden, hidden), ("384→1536", hidden, inner), ("1536→384", inner, hidden)]
    {
        linears(&report, name, rows, input, output)?;
    }
    attentions(&report, &packing, hidden, heads)?;
    norms(&report, &packing, rows, hidden)?;
    gelus(&report, rows, inner)?;
    embeddings(&report, rows, hidden)?;
    optimizers(&report, 22_715_141)
}

/// The rate of a bare product and of a copy.
fn peak() -> Result<Peak> {
    let (rows, input, output) = (2048, 1536, 1536);
    let (x, w) = (random(1, &[rows, input])?, buffer(1, input * output, 0.02)?);
    let mut product = || {
        linear::forward(&x, w.view(0..w.len()), None)?;
        Ok(())
    };
    let from = vec![1f32; 1 << 26];
    let mut to = vec![0f32; 1 << 26];
    let mut copy = || {
        std::thread::scope(|s| {
            let ((a, b), (from_a, from_b)) = (to.split_at_mut(1 << 25), from.split_at(1 << 25));
            s.spawn(|| a.copy_from_slice(from_a));
            b.copy_from_slice(from_b);
        });
        Ok(())
    };
    let [product, copy] = in_turns([&mut product, &mut copy])?;
    Ok(Peak { flops: (2 * rows * input * output) as f64 / product, bytes: (8 * from.len()) as f64 / copy })
}

fn linears(report: &Report, name: &str, rows: usize, input: usize, output: usize) -> Result<()> {
    let (x, dy) = (random(1, &[rows, input])?, random(2, &[rows, output])?);
    let (w, b) = (buffer(1, output * input, 0.02)?, buffer(2, output, 0.02)?);
    let (tx, tw, tb) = (Var::from_tensor(&x)?, var(&w, &[output, input])?, var(&b, &[output])?);
    let flops = (2 * rows * input * output) as f64;
    let title = format!("linear {name} forward");
    if report.wants(&title) {
        let mut kernel = || discard(linear::forward(&x, w.view(0..w.len()), Some(b.view(0..output))));
        let (x, w, b) = (tx.detach(), tw.detach(), tb.detach());
        let mut twin = || discard(x.matmul(&w.t()?)?.broadcast_add(&b));
        report.line(&title, Work::Flops(flops), in_turns([&mut kernel, &mut twin])?);
    }
    let title = format!("linear {name} backward");
    if report.wants(&title) {
        let (mut dw, mut db) = (Buffer::zeros(w.len(), &Device::Cpu)?, Buffer::zeros(output, &Device::Cpu)?);
        let mut kernel = || {
            let (dw, db) = (dw.view_mut(0..output * input), db.view_mut(0..output));
            discard(linear::backward(&x, &dy, w.view(0..w.len()), Grad::New, Some(dw), Some(db)))
        };
        let y = tx.matmul(&tw.t()?)?.broadcast_add(&tb)?.mul(&dy)?;
        let mut twin = || discard(y.backward());
        report.line(&title, Work::Flops(2.0 * flops), in_turns([&mut kernel, &mut twin])?);
    }
    Ok(())
}

fn attentions(report: &Report, packing: &Packing, hidden: usize, heads: usize) -> Result<()> {
    let (sequences, length, head_dim) = (packing.sequences(), packing.max_length(), hidden / heads);
    let scale = (head_dim as f32).sqrt().recip();
    let rows = packing.tokens();
    let [q, k, v, dy] = [1, 2, 3, 4].map(|i| random(i, &[rows, hidden]));
    let (q, k, v, dy) = (q?, k?, v?, dy?);
    let vars = [Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?];
    let plain = |[q, k, v]: [&Tensor; 3]| -> Result<Tensor> {
        let split = |x: &Tensor| x.reshape((sequences, length, heads, head_dim))?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (split(q)?, split(k)?, split(v)?);
        let scores = (q.matmul(&k.t()?)? * f64::from(scale))?;
        let out = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        Ok(out.transpose(1, 2)?.contiguous()?.reshape((rows, hidden))?)
    };
    let flops = (4 * sequences * length * length * hidden) as f64;
    if report.wants("attention forward") {
        let mut kernel = || discard(attention::forward(&q, &k, &v, packing, heads, scale, Some(&DROPOUT)));
        let mut twin = || discard(plain([&q, &k, &v]));
        report.line("attention forward", Work::Flops(flops), in_turns([&mut kernel, &mut twin])?);
    }
    if report.wants("attention backward") {
        let (out, lse) = attention::forward(&q, &k, &v, packing, heads, scale, Some(&DROPOUT))?;
        let mut kernel = || {
            let gradients = attention::backward(&q, &k, &v, &out, &lse, &dy, packing, heads, scale, Some(&DROPOUT))?;
            drop(gradients);
            Ok(())
        };
        let y = plain([&vars[0], &vars[1], &vars[2]])?.mul(&dy)?;
        let mut twin = || discard(y.backward());
        report.line("attention backward", Work::Flops(2.0 * flops), in_turns([&mut kernel, &mut twin])?);
    }
    Ok(())
}

fn norms(report: &Report, packing: &Packing, rows: usize, hidden: usize) -> Result<()> {
    let (x, residual, dy) = (random(1, &[rows, hidden])?, random(2, &[rows, hidden])?, random(3, &[rows, hidden])?);
    let parameters = buffer(4, 2 * hidden, 1.0)?;
    let (gamma, beta) = (parameters.view(0..hidden), parameters.view(hidden..2 * hidden));
    let (tx, tr) = (Var::from_tensor(&x)?, Var::from_tensor(&residual)?);
    let (tg, tb) = (var(&buffer(5, hidden, 1.0)?, &[hidden])?, var(&buffer(6, hidden, 1.0)?, &[hidden])?);
    let plain = |x: &Tensor, r: &Tensor| -> Result<Tensor> {
        let sum = (x + r)?;
        let centred = sum.broadcast_sub(&sum.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
        Ok(centred.broadcast_div(&deviation)?.broadcast_mul(&tg)?.broadcast_add(&tb)?)
    };
    let bytes = (4 * rows * hidden) as f64;
    let masked = Some((&DROPOUT, packing));
    let title = "dropout + residual + layer_norm forward";
    if report.wants(title) {
        let mut kernel = || discard(layer_norm::forward(&x, Some(&residual), masked, gamma, beta, 1e-12));
        let (x, r) = (tx.detach(), tr.detach());
        let mut twin = || discard(plain(&x, &r));
        report.line(title, Work::Bytes(4.0 * bytes), in_turns([&mut kernel, &mut twin])?);
    }
    let title = "dropout + residual + layer_norm backward";
    if report.wants(title) {
        let (_, saved) = layer_norm::forward(&x, Some(&residual), masked, gamma, beta, 1e-12)?;
        let mut gradients = Buffer::zeros(2 * hidden, &Device::Cpu)?;
        let mut spare = Some(dy.copy()?);
        let mut kernel = || {
            let [dgamma, dbeta] = gradients.views_mut([0..hidden, hidden..2 * hidden])?;
            let dy = spare.take().map_or_else(|| dy.copy(), Ok)?; // the gradient that it overwrote last time
            let (_, dr) = layer_norm::backward(&saved, masked, dy, gamma, Some(dgamma), Some(dbeta), true)?;
            spare = dr;
            Ok(())
        };
        let y = plain(&tx, &tr)?.mul(&dy)?;
        let mut twin = || discard(y.backward());
        report.line(title, Work::Bytes(4.0 * bytes), in_turns([&mut kernel, &mut twin])?);
    }
    Ok(())
}

fn gelus(report: &Report, rows: usize, inner: usize) -> Result<()> {
    let (x, dy) = (random(1, &[rows, inner])?, random(2, &[rows, inner])?);
    let bytes = (4 * rows * inner) as f64;
    let tx = Var::from_tensor(&x)?;
    if report.wants("gelu forward") {
        let mut kernel = || discard(gelu::forward(&x));
        let x = tx.detach();
        let mut twin = || discard(x.gelu_erf());
        report.line("gelu forward", Work::Bytes(2.0 * bytes), in_turns([&mut kernel, &mut twin])?);
    }
    if report.wants("gelu backward") {
        let mut spare = Some(dy.copy()?);
        let mut kernel = || {
            spare = Some(gelu::backward(&x, spare.take().map_or_else(|| dy.copy(), Ok)?)?);
            Ok(())
        };
        let y = tx.gelu_erf()?.mul(&dy)?;
        let mut twin = || discard(y.backward());
        report.line("gelu backward", Work::Bytes(3.0 * bytes), in_turns([&mut kernel, &mut twin])?);
    }
    Ok(())
}

fn embeddings(report: &Report, rows: usize, hidden: usize) -> Result<()> {
    let vocabulary = 30_522;
    let table = buffer(1, vocabulary * hidden, 0.02)?;
    let ids: Vec<u32> = (0..rows).map(|i| (i * 104_729 % vocabulary) as u32).collect();
    let dy = random(2, &[rows, hidden])?;
    let twin_table = var(&table, &[vocabulary, hidden])?;
    let twin_ids = Tensor::new(&ids[..], &Device::Cpu)?;
    let bytes = (4 * rows * hidden) as f64;
    if report.wants("embedding forward") {
        let mut kernel = || discard(embedding::forward(&[(table.view(0..table.len()), &ids)], hidden));
        let plain = twin_table.detach();
        let mut twin = || discard(plain.index_select(&twin_ids, 0));
        report.line("embedding forward", Work::Bytes(2.0 * bytes), in_turns([&mut kernel, &mut twin])?);
    }
    if report.wants("embedding backward") {
        let mut gradient = Buffer::zeros(table.len(), &Device::Cpu)?;
        let mut kernel = || Ok(embedding::backward(&dy, &ids, gradient.view_mut(0..vocabulary * hidden))?);
        let y = twin_table.index_select(&twin_ids, 0)?.mul(&dy)?;
        let mut twin = || discard(y.backward());
        report.line("embedding backward", Work::Bytes(3.0 * bytes), in_turns([&mut kernel, &mut twin])?);
    }
    Ok(())
}

fn optimizers(report: &Report, elements: usize) -> Result<()> {
    let (mut p, mut g) = (buffer(1, elements, 0.01)?, buffer(2, elements, 0.01)?);
    let (mut m, mut v) = (buffer(3, elements, 0.01)?, Buffer::zeros(elements, &Device::Cpu)?);
    let bytes = (4 * elements) as f64;
    if report.wants("gradient norm") {
        let mut kernel = || discard(norm::global(&g, std::slice::from_ref(&(0..elements))));
        let twin_g = var(&g, &[elements])?.detach();
        let mut twin = || discard(twin_g.sqr()?.sum_all()?.to_scalar::<f32>());
        report.line("gradient norm, 22.7 M", Work::Bytes(bytes), in_turns([&mut kernel, &mut twin])?);
    }
    if report.wants("adamw") {
        let groups = [adamw::Group { range: 0..elements, learning_rate: 1e-5, weight_decay: 0.01 }];
        let settings = adamw::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, step: 10, gradient_scale: 1.0 };
        v.fill(1e-4)?;
        let (theta, mut first, mut second) = (
            var(&p, &[elements])?,
            Tensor::zeros(elements, DType::F32, &Device::Cpu)?,
            Tensor::zeros(elements, DType::F32, &Device::Cpu)?,
        );
        let gradient = var(&g, &[elements])?.detach();
        let mut kernel = || Ok(adamw::step(&mut p, &mut g, &mut m, &mut v, &groups, &settings)?);
        // candle_nn::AdamW's own lines, on one tensor.
        let mut twin = || {
            first = ((&first * 0.9)? + (&gradient * 0.1)?)?;
            second = ((&second * 0.999)? + (gradient.sqr()? * 0.001)?)?;
            let update = ((&first / 0.65)? / ((&second / 0.01)?.sqrt()? + 1e-8)?)?;
            theta.set(&((theta.as_tensor() * (1.0 - 1e-7))? - (update * 1e-5)?)?)?;
            Ok(())
        };
        report.line("adamw, 22.7 M", Work::Bytes(8.0 * bytes), in_turns([&mut kernel, &mut twin])?);
    }
    Ok(())
}
