//! Inference on BBC's test part, tokenized beforehand: kiln's export of a model in kiln's predictor.

#[path = "support.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kiln::config::{Config, Data, Format, Overrides, Source, Split};
use kiln::data::{Example, Tokenizer, encode_texts, read_rows};
use kiln::export::onnx;
use kiln::infer::{Options as Workers, Predictor, runtime};
use kiln::pretrained::Classifier;
use kiln::progress::Progress;
use serde_json::json;
use support::{Common, fetched, timed};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // as the program has it

/// Times kiln's inference and prints a line of JSON
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// CSV with columns text, label; by default BBC's test part
    #[arg(long)]
    data: Option<PathBuf>,
    /// Tokens kept of each text
    #[arg(long, default_value_t = 512)]
    max_length: usize,
    /// The first rows alone
    #[arg(long, default_value_t = 160)]
    documents: usize,
    /// Tokens in one batch at most; by default infer.max_tokens'
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Exports the model there and ends
    #[arg(long)]
    export: Option<PathBuf>,
}

fn main() -> Result<()> {
    let Options { common, data, max_length, documents, max_tokens, export } = Options::parse();
    let model = common.model()?;
    if let Some(file) = export {
        return write(&model, &file);
    }
    // By a process of its own, so that the peak below is inference's.
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.onnx");
    let status = Command::new(std::env::current_exe()?)
        .args(["--model".as_ref(), model.as_os_str(), "--export".as_ref(), file.as_os_str()])
        .status()?;
    ensure!(status.success(), "the export failed: {status}");

    let tokenizer = Tokenizer::from_folder(&model)?;
    let source = fetched(data.as_deref(), "bbc-split/test.csv")?;
    let columns = Data {
        source: Source::Path(source.clone()),
        format: Format::Auto,
        text: "text".into(),
        text_pair: None,
        label: "label".into(),
        id: None,
        split: Split { validation: 0.0, test: 0.0, seed: 0 },
    };
    let mut rows = read_rows(&source, &columns)?;
    rows.truncate(documents);
    let texts: Vec<_> = rows.iter().map(|row| (row.text.as_str(), None)).collect();
    let encoded = encode_texts(&tokenizer, &texts, max_length, common.threads)?;
    let examples: Vec<_> = encoded
        .iter()
        .map(|row| Example { input_ids: &row.input_ids, token_type_ids: Some(&row.token_type_ids) })
        .collect();

    let max_tokens = match max_tokens {
        Some(max_tokens) => max_tokens,
        None => Config::load(None, &Overrides::default())?.infer.max_tokens,
    };
    let workers = Workers { workers: common.threads, max_tokens, pad_id: tokenizer.pad_id() };
    let runtime = runtime::ensure(false)?;
    let predictor = Predictor::open(runtime, &file, workers)?;
    let quiet = Progress::new("", 0, "row", true);
    predictor.predict(&examples[..examples.len().min(8 * common.warmup)], &quiet)?;
    let (mut seconds, mut logits) = (Vec::new(), Vec::new());
    for _ in 0..common.steps {
        let (predictions, took) = timed(|| predictor.predict(&examples, &quiet))?;
        seconds.push(took);
        logits = predictions.logits;
    }

    let labels = read_labels(&model)?;
    let losses = rows.iter().zip(&logits).map(|(row, logits)| {
        let label = labels.iter().position(|label| Some(label) == row.label.as_ref());
        let label = label.with_context(|| format!("the model has no label {:?}", row.label))?;
        let log_sum = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        Ok(log_sum - f64::from(logits[label]))
    });
    let loss = losses.sum::<Result<f64>>()? / rows.len() as f64;
    let (passes, total) = (common.steps as f64, seconds.iter().sum::<f64>());
    let tokens: usize = examples.iter().map(|example| example.input_ids.len()).sum();
    let figures = json!({
        "loss": loss,
        "examples_per_second": rows.len() as f64 * passes / total,
        "tokens_per_second": tokens as f64 * passes / total,
    });
    let library = runtime.library().file_name().unwrap_or_default().to_string_lossy().into_owned();
    let notes =
        [&*format!("{} workers of one thread", common.threads), &*format!("max_tokens {max_tokens}"), &*library];
    common.print("kiln", &seconds, figures, &["kiln", "ort"], &notes)
}

/// Exports the checkpoint in `model` to `file`, as `kiln export` writes it.
fn write(model: &Path, file: &Path) -> Result<()> {
    let opset = Config::load(None, &Overrides::default())?.export.opset;
    onnx::write(&Classifier::load(model)?.graph()?, "peer", opset, &[], file, onnx::EXTERNAL_ABOVE)
}

/// The labels of a checkpoint, by id.
fn read_labels(model: &Path) -> Result<Vec<String>> {
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(model.join("config.json"))?)?;
    let labels = config["id2label"].as_object().context("config.json has no id2label")?;
    (0..labels.len()).map(|id| Ok(labels[&id.to_string()].as_str().context("a label is no text")?.to_owned())).collect()
}
