//! One training step as the trainer makes it: data, forward, backward, optimizer; and the time that
//! its matrix products take alone, which is the limit of what the rest can be hidden behind.
//!
//! ```sh
//! cargo bench --bench step                                          # MiniLM 16×128 by default
//! cargo bench --bench step -- --batch 8 --model experiments/data/bert-base-random
//! cargo bench --bench step -- --data rows.csv --max-length 256      # real lengths
//! ```
//! `--json` prints the line that `benches/peers/run.sh` reads.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use kiln::allocator::KeptPages;
use kiln::config::{Config, Overrides};
use kiln::data::sampler::{Sampler, Share, cut};
use kiln::data::{Encoded, Example, Tokenizer, encode_texts, read_rows};
use kiln::pretrained::Classifier;
use kiln::train::{Optimizer, gradient_coverage};
use kiln_kernels::{Buffer, DType, Device, Grad, Tensor, cross_entropy, linear, threads};
use kiln_models::nn::{Mode, Parameter};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Arguments {
    /// The name that the JSON line carries.
    #[arg(default_value = "step-minilm")]
    workload: String,
    /// A Hugging Face folder.
    #[arg(long, default_value = "experiments/data/all-MiniLM-L6-v2")]
    model: PathBuf,
    /// Examples of a step.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of each example, where no data is given.
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// A CSV file with columns text and label: its rows, at their real lengths.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Tokens kept of each text of --data.
    #[arg(long, default_value_t = 256)]
    max_length: usize,
    /// The classifier's labels.
    #[arg(long, default_value_t = 5)]
    labels: usize,
    #[arg(long, default_value_t = 10)]
    steps: u64,
    #[arg(long, default_value_t = 2)]
    warmup: u64,
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, |n| n.get()))]
    threads: usize,
    /// Dropout everywhere, in place of what the folder says.
    #[arg(long)]
    dropout: Option<f64>,
    /// Tokens that go through at once.
    #[arg(long, default_value_t = 4096)]
    micro_batch_tokens: usize,
    /// Layers are computed again in backward instead of being kept.
    #[arg(long)]
    recompute: bool,
    /// One line of JSON on stdout.
    #[arg(long)]
    json: bool,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Of the order of examples and of dropout.
const SEED: u64 = 42;

/// Seconds of a step's parts.
#[derive(Clone, Copy, Default)]
struct Seconds {
    data: f64,
    forward: f64,
    backward: f64,
    optimizer: f64,
}

impl Seconds {
    fn total(self) -> f64 {
        self.data + self.forward + self.backward + self.optimizer
    }
}

struct Bench {
    classifier: Classifier,
    optimizer: Optimizer,
    examples: Vec<Encoded>,
    labels: Vec<u32>,
    lengths: Vec<u32>,
    sampler: Sampler,
    recompute: bool,
}

impl Bench {
    fn new(arguments: &Arguments) -> Result<Self> {
        threads::set(arguments.threads)?;
        let names: Vec<String> = (0..arguments.labels).map(|i| i.to_string()).collect();
        let (classifier, _) = Classifier::pretrained(&arguments.model, &names, arguments.dropout, 1)?;
        let sets = [format!("train.batch_size={}", arguments.batch), format!("train.threads={}", arguments.threads)];
        let config = Config::load(None, &Overrides { sets: sets.to_vec(), ..Overrides::default() })?;
        let settings = &config.models.first().context("the quickstart has no model")?.train;
        let optimizer = Optimizer::new(&classifier.built().parameters, settings)?;
        let (examples, labels) = match &arguments.data {
            Some(file) => {
                let data =
                    kiln::config::Data { source: kiln::config::Source::Path(file.clone()), ..config.data.clone() };
                let rows = read_rows(file, &data)?;
                let tokenizer = Tokenizer::from_folder(&arguments.model)?;
                let texts: Vec<_> = rows.iter().map(|row| (row.text.as_str(), None)).collect();
                let mut known: Vec<_> = rows.iter().filter_map(|row| row.label.as_deref()).collect();
                known.sort();
                known.dedup();
                if known.len() > arguments.labels {
                    bail!("{}: {} labels; give --labels {}", file.display(), known.len(), known.len());
                }
                let label = |row: &kiln::data::Row| known.iter().position(|l| Some(*l) == row.label.as_deref());
                let labels = rows.iter().map(|row| label(row).unwrap_or(0) as u32).collect();
                (encode_texts(&tokenizer, &texts, arguments.max_length, arguments.threads)?, labels)
            }
            None => synthetic(arguments),
        };
        let lengths: Vec<u32> = examples.iter().map(|e| e.input_ids.len() as u32).collect();
        let sampler = Sampler::new(lengths.clone(), SEED, arguments.batch, arguments.micro_batch_tokens, 1);
        Ok(Self { classifier, optimizer, examples, labels, lengths, sampler, recompute: arguments.recompute })
    }

    /// The examples of a step: those of one batch in their order where there is one batch alone.
    fn micro_batches(&mut self, step: u64, tokens: usize) -> Vec<Vec<u32>> {
        if self.sampler.steps_per_epoch() == 1 {
            return cut(&(0..self.examples.len() as u32).collect::<Vec<_>>(), &self.lengths, tokens, 1);
        }
        self.sampler.micro_batches(step, Share::ALL).concat()
    }

    /// One step; its seconds, its tokens and its mean loss.
    fn step(&mut self, step: u64, tokens: usize) -> Result<(Seconds, u64, f64)> {
        let mut seconds = Seconds::default();
        let (mut loss, mut seen) = (0.0, 0);
        let mut clock = Instant::now();
        let mut lap = |part: &mut f64| {
            *part += clock.elapsed().as_secs_f64();
            clock = Instant::now();
        };
        let batch = self.micro_batches(step, tokens);
        let weight = batch.iter().map(Vec::len).sum::<usize>() as f64;
        for micro in &batch {
            let examples: Vec<_> = micro.iter().map(|&i| example(&self.examples[i as usize])).collect();
            let labels: Vec<u32> = micro.iter().map(|&i| self.labels[i as usize]).collect();
            let ids = micro.iter().map(|&i| u64::from(i)).collect();
            let inputs = self.classifier.inputs(&examples, ids, Mode::Train { seed: SEED, step })?;
            let inputs = inputs.recompute(self.recompute);
            seen += examples.iter().map(|e| e.input_ids.len() as u64).sum::<u64>();
            lap(&mut seconds.data);
            let logits = self.classifier.built().model.forward(&inputs)?;
            let (losses, dlogits) = cross_entropy::forward(logits.data()?, &labels, None, 0.0, weight)?;
            loss += losses.to_vec1::<f32>()?.iter().map(|&l| f64::from(l)).sum::<f64>();
            lap(&mut seconds.forward);
            inputs.tape().context("no tape")?.backward(&logits, dlogits)?;
            lap(&mut seconds.backward);
        }
        let parameters = &self.classifier.built().parameters;
        if step == 0 {
            gradient_coverage(parameters)?;
        }
        let norm = self.optimizer.gradient_norm(parameters)?;
        self.optimizer.step(parameters, step, 5e-5, norm)?;
        lap(&mut seconds.optimizer);
        Ok((seconds, seen, loss / weight))
    }

    /// Seconds that a step's matrix products take alone: each linear layer's three, one after the
    /// other as the step has them, and attention's at the rate of those (six of
    /// `length² × hidden_size`, two forward and four back). The last layer is asked for first tokens
    /// alone, so that only its keys and values have all rows.
    fn products(&self, batch: &[Vec<u32>]) -> Result<f64> {
        let parameters = &self.classifier.built().parameters;
        let is_layer = |p: &&Parameter| p.name().contains(".layer.") && p.shape().len() == 2;
        let layers: Vec<_> = parameters.iter().filter(is_layer).collect();
        let hidden = layers.first().context("no layers")?.shape()[1];
        let depth = layers.iter().filter(|p| p.name().contains("query")).count();
        let last = format!(".layer.{}.", depth - 1);
        let is_short =
            |p: &Parameter| p.name().contains(&last) && !p.name().contains("key") && !p.name().contains("value");
        let values = parameters.values();
        let (mut seconds, mut flops, mut attention) = (0.0, 0.0, 0.0);
        for micro in batch {
            let lengths = || micro.iter().map(|&i| self.lengths[i as usize] as usize);
            let tokens: usize = lengths().sum();
            attention += lengths().map(|l| 12.0 * (l * (l * (depth - 1) + 1) * hidden) as f64).sum::<f64>();
            for layer in &layers {
                let [output, input] = [layer.shape()[0], layer.shape()[1]];
                let rows = if is_short(layer) { micro.len() } else { tokens };
                let ones = |columns: usize| Tensor::ones((rows, columns), DType::F32, &Device::Cpu);
                let (x, dy, mut dw) = (ones(input)?, ones(output)?, Buffer::zeros(output * input, &Device::Cpu)?);
                let w = values.view(layer.range());
                let started = Instant::now();
                linear::forward(&x, w, None)?;
                linear::backward(&x, &dy, w, Grad::New, Some(dw.view_mut(0..output * input)), None)?;
                seconds += started.elapsed().as_secs_f64();
                flops += 6.0 * (rows * output * input) as f64;
            }
        }
        Ok(seconds * (1.0 + attention / flops))
    }
}

/// One batch of examples of one length, by a rule that peers can follow.
fn synthetic(arguments: &Arguments) -> (Vec<Encoded>, Vec<u32>) {
    let example = |i: usize| {
        let mut input_ids: Vec<i32> =
            (0..arguments.length).map(|j| (1000 + (i * 7919 + j * 104_729) % 28_000) as i32).collect();
        input_ids[0] = 101;
        input_ids[arguments.length - 1] = 102;
        Encoded { token_type_ids: vec![0; input_ids.len()], input_ids }
    };
    let labels = (0..arguments.batch).map(|i| (i % arguments.labels) as u32).collect();
    ((0..arguments.batch).map(example).collect(), labels)
}

fn example(encoded: &Encoded) -> Example<'_> {
    Example { input_ids: &encoded.input_ids, token_type_ids: Some(&encoded.token_type_ids) }
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A line of /proc/self/status, in bytes.
fn status(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim_start_matches(':').trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

fn page_faults() -> i64 {
    // SAFETY: getrusage fills the struct that it is given.
    unsafe {
        let mut usage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage.ru_minflt
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let _kept = KeptPages::new(); // as in training
    let mut bench = Bench::new(&arguments)?;
    let tokens = arguments.micro_batch_tokens;
    let (mut rates, mut steps, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    let mut faults = 0;
    for step in 0..arguments.warmup + arguments.steps {
        if step == arguments.warmup {
            faults = page_faults();
        }
        let (seconds, seen, loss) = bench.step(step, tokens)?;
        losses.push(loss);
        if step >= arguments.warmup {
            rates.push(seen as f64 / seconds.total());
            steps.push(seconds);
        }
    }
    let faults = (page_faults() - faults) / arguments.steps.max(1) as i64;
    let peak = status("VmHWM");
    // The limit, of the last steps' batches; after the steps, so that it adds nothing to their memory.
    let mut limits = Vec::new();
    for step in arguments.warmup..arguments.warmup + arguments.steps.min(5) {
        let batch = bench.micro_batches(step, tokens);
        let seen: u64 = batch.iter().flatten().map(|&i| u64::from(bench.lengths[i as usize])).sum();
        limits.push(seen as f64 / bench.products(&batch)?);
    }
    let (rate, limit) = (median(rates), median(limits));
    let part = |f: fn(&Seconds) -> f64| median(steps.iter().map(f));
    let [data, forward, backward, optimizer] =
        [part(|s| s.data), part(|s| s.forward), part(|s| s.backward), part(|s| s.optimizer)];
    if arguments.json {
        let line = serde_json::json!({
            "contestant": "kiln", "workload": arguments.workload, "tokens_per_second": rate,
            "seconds": steps.iter().map(|s| s.total()).collect::<Vec<_>>(),
            "data": data, "forward": forward, "backward": backward, "optimizer": optimizer,
            "peak_rss_bytes": peak, "loss": losses.first(), "second_loss": losses.get(1), "limit_tokens_per_second": limit,
            "page_faults_per_step": faults, "versions": { "kiln": env!("CARGO_PKG_VERSION") },
        });
        println!("{line}");
    } else {
        println!(
            "{}: {rate:.0} tokens/s, {:.1} % of the products' {limit:.0}; data {:.2} ms, forward {:.1} ms, \
             backward {:.1} ms, optimizer {:.1} ms; peak {:.0} MB, {faults} page faults a step; first loss {:.6}",
            arguments.workload,
            100.0 * rate / limit,
            1e3 * data,
            1e3 * forward,
            1e3 * backward,
            1e3 * optimizer,
            peak.unwrap_or(0) as f64 / 1e6,
            losses.first().unwrap_or(&f64::NAN),
        );
    }
    Ok(())
}
