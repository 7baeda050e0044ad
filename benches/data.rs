//! Data on its way to a step: encoding a corpus into a snapshot, and the batches of an encoded part.

#[path = "support.rs"]
mod support;

use std::fs;
use std::hint::black_box;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use kiln::config::{Config, Data, Format, Overrides, Source, Split};
use kiln::data::sampler::{Sampler, Share};
use kiln::data::{Part, Snapshot, Tokenizer, encode_texts, prepare};
use kiln::pretrained::Classifier;
use kiln_models::nn::Mode;
use serde_json::json;
use support::{Common, fetched, timed};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // as the program has it

/// Times kiln's way from rows to batches and prints a line of JSON
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// What to time
    #[arg(long, value_enum, default_value = "encode")]
    what: What,
    /// CSV with columns text, label; by default BBC's train part eight times
    #[arg(long)]
    data: Option<PathBuf>,
    /// Tokens kept of each text
    #[arg(long, default_value_t = 256)]
    max_length: usize,
    /// Rows in a batch that is loaded
    #[arg(long, default_value_t = 16)]
    batch: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Rows to an encoded part on disk
    Encode,
    /// Packed batches of one epoch of an encoded part
    Load,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let folder = tempfile::tempdir()?;
    let data = Data {
        source: Source::Path(fetched(options.data.as_deref(), "peers/bbc-repeated.csv")?),
        format: Format::Auto,
        text: "text".into(),
        text_pair: None,
        label: "label".into(),
        id: None,
        split: Split { validation: 0.0, test: 0.0, seed: 0 }, // all to train on
    };
    let snapshot = prepare(&data, folder.path())?;
    match options.what {
        What::Encode => encode(&options, &snapshot),
        What::Load => load(&options, &snapshot),
    }
}

/// A part from its rows to the Arrow file that training maps; and the tokenizing in it alone.
fn encode(Options { common, max_length, .. }: &Options, snapshot: &Snapshot) -> Result<()> {
    let tokenizer = Tokenizer::from_folder(&common.model()?)?;
    let inputs = ["input_ids", "attention_mask", "token_type_ids"];
    let rows = snapshot.rows(Part::Train)?;
    let texts: Vec<_> = rows.iter().map(|row| (row.text.as_str(), None)).collect();
    let (mut seconds, mut tokenizing) = (Vec::new(), Vec::new());
    for step in 0..common.warmup + common.steps {
        let (encoding, took) =
            timed(|| snapshot.encode(&tokenizer, *max_length, &inputs, &[Part::Train], common.threads))?;
        fs::remove_dir_all(encoding.dir(Part::Train)?)?; // or the next would find it done
        let (_, alone) = timed(|| encode_texts(&tokenizer, &texts, *max_length, common.threads))?;
        if step >= common.warmup {
            seconds.push(took);
            tokenizing.push(alone);
        }
    }
    let total = (rows.len() * common.steps) as f64;
    let bytes = (rows.iter().map(|row| row.text.len()).sum::<usize>() * common.steps) as f64;
    let [took, alone]: [f64; 2] = [&seconds, &tokenizing].map(|seconds| seconds.iter().sum());
    let figures = json!({
        "rows_per_second": total / took,
        "megabytes_per_second": bytes / took / 1e6,
        "mapping_rows_per_second": total / alone,
    });
    let notes = ["rows.parquet to Arrow with lengths before truncation, synced and hashed"];
    common.print("kiln", &seconds, figures, &["kiln", "tokenizers"], &notes)
}

/// Each batch of an epoch as the trainer makes it, from the mapped file to the packed inputs of the forward.
fn load(Options { common, max_length, batch, .. }: &Options, snapshot: &Snapshot) -> Result<()> {
    let model = common.model()?;
    let (classifier, tokenizer) = (Classifier::load(&model)?, Tokenizer::from_folder(&model)?);
    let parts = [Part::Train];
    let dataset = snapshot
        .encode(&tokenizer, *max_length, classifier.input_names(), &parts, common.threads)?
        .dataset(Part::Train)?;
    let settings = &Config::load(None, &Overrides::default())?.models[0].train;
    let lengths: Vec<u32> = (0..dataset.len()).map(|i| dataset.length(i) as u32).collect();
    let mut sampler = Sampler::new(lengths.clone(), settings.seed, *batch, settings.micro_batch_tokens, 1);
    let (mut seconds, mut tokens, mut rows) = (Vec::new(), 0, 0);
    for step in 0..sampler.steps_per_epoch() {
        let (batch, took) = timed(|| {
            let batch = sampler.micro_batches(step, Share::ALL).concat();
            for micro_batch in &batch {
                let examples: Vec<_> = micro_batch.iter().map(|&i| dataset.example(i as usize)).collect();
                let labels: Vec<_> = micro_batch.iter().filter_map(|&i| dataset.label(i as usize)).collect();
                let ids = micro_batch.iter().map(|&i| u64::from(i)).collect();
                let mode = Mode::Train { seed: settings.seed, step };
                black_box((classifier.inputs(&examples, ids, mode)?, labels));
            }
            Ok(batch)
        })?;
        seconds.push(took);
        rows += batch.concat().len();
        tokens += batch.concat().iter().map(|&i| lengths[i as usize] as usize).sum::<usize>();
    }
    let total: f64 = seconds.iter().sum();
    let figures = json!({ "rows_per_second": rows as f64 / total, "tokens_per_second": tokens as f64 / total });
    common.print("kiln", &seconds, figures, &["kiln"], &["a whole epoch; the first batch shuffles it"])
}
