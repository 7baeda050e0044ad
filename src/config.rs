//! The experiment file, resolved once, at the edge, into one [`Config`] of plain values.
//!
//! [`Config::load`] reads the TOML, lays `--set` and the other options over it, checks every key,
//! type and range, and fills in the defaults. Below it no `Option` means "the default" and nothing
//! reads the environment.

mod document;
mod load;
mod problem;
#[cfg(test)]
mod reference;
mod resolve;
mod table;
#[cfg(test)]
mod tests;
mod track;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use load::hex;
pub use load::{Overrides, QUICKSTART, ROOT, available_memory, available_threads};
pub use problem::ConfigError;
pub use track::{Mlflow, Track, Wandb, WandbMode};

/// One experiment: what is trained, on what, and how it is judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The experiment's name, a folder under `root`.
    pub name: String,
    /// Which run of the experiment this is.
    pub run_num: RunNum,
    /// The folder that holds all experiments.
    pub root: PathBuf,
    /// What "best" means, on validation.
    pub objective: Objective,
    /// Where rows come from and how they are split.
    pub data: Data,
    /// The models to train; one at least, with unique names.
    pub models: Vec<Model>,
    /// How many processes train them together.
    #[serde(default)] // runs made before the key was there
    pub distributed: Distributed,
    /// How models become ONNX files.
    pub export: Export,
    /// How exported models are run.
    pub infer: Infer,
    /// Who hears of a training.
    #[serde(default)] // as above
    pub track: Track,
    /// The experiment file as given, for the run's experiment.toml, with `--set` options as
    /// comments. Empty in a configuration read back from a run.
    #[serde(skip)]
    pub text: String,
    /// The `--set` options that were laid over it. Empty in a configuration read back from a run.
    #[serde(skip)]
    pub sets: Vec<String>,
}

/// Which run of its experiment a training is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunNum {
    /// The newest unfinished run with the same configuration and data, else a new one.
    Next,
    /// This run, which must not be finished.
    Number(u32),
}

/// The figure that chooses the best checkpoint and the best model, on validation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objective {
    /// The figure.
    pub metric: Metric,
    /// Whether more or less of it is better.
    pub goal: Goal,
}

/// A figure of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The unweighted mean of the labels' F1.
    MacroF1,
    /// The share of right predictions.
    Accuracy,
    /// F1 over all decisions together.
    MicroF1,
    /// The labels' F1 weighted by their counts.
    WeightedF1,
    /// The mean loss.
    Loss,
}

/// The better direction of a [`Metric`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// More is better.
    Max,
    /// Less is better.
    Min,
}

/// The rows: where they are, which columns count, how they are split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// Where the rows are.
    pub source: Source,
    /// How they are written.
    pub format: Format,
    /// The column with the text.
    pub text: String,
    /// The column with the second text of a pair.
    pub text_pair: Option<String>,
    /// The column with the label.
    pub label: String,
    /// The column that names a row; without it the row's number in its source, from 0.
    pub id: Option<String>,
    /// How the parts that `source` does not give are cut out of the one it gives.
    pub split: Split,
}

/// Where the rows are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The generator in kiln itself.
    Sample,
    /// One file or folder, to be split.
    Path(PathBuf),
    /// Parts given apart; those left out are split from `train`.
    Parts {
        /// Rows to train on.
        train: PathBuf,
        /// Rows to choose the best checkpoint on.
        validation: Option<PathBuf>,
        /// Rows that training never sees.
        test: Option<PathBuf>,
    },
}

/// How a source is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// By the file's extension; a folder is [`Format::Folders`].
    Auto,
    /// Comma-separated, with a header.
    Csv,
    /// Tab-separated, with a header.
    Tsv,
    /// One JSON object a line.
    Jsonl,
    /// Parquet.
    Parquet,
    /// Arrow, as a stream or a file.
    Arrow,
    /// A folder for each label, a text file for each row.
    Folders,
}

/// Shares of the rows, each in 0..1 and together below 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Split {
    /// The share that becomes the validation part, where `source` gives none.
    pub validation: f64,
    /// The share that becomes the test part, where `source` gives none.
    pub test: f64,
    /// The seed of the shuffle.
    pub seed: u64,
}

/// One model to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Its name, a folder in the run.
    pub name: String,
    /// Where it starts from.
    pub origin: Origin,
    /// Tokens kept of each text, special tokens included.
    pub max_length: usize,
    /// `[train]` with this model's `[model.train]` laid over it.
    pub train: Train,
}

/// Where a model starts from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A Hugging Face folder: config.json, model.safetensors, tokenizer.json.
    Folder(PathBuf),
    /// Such a folder on the Hub.
    Hub {
        /// `org/name`.
        repository: String,
        /// A branch, a tag or a commit.
        revision: String,
        /// Where it lies; empty until it is fetched.
        #[serde(skip)]
        folder: PathBuf,
    },
    /// New weights and a tokenizer trained on the train part.
    Scratch {
        /// The architecture's `model_type`, as in a config.json.
        architecture: String,
        /// Keys of a config.json; those left out are the architecture's defaults.
        config: serde_json::Map<String, serde_json::Value>,
        /// Size of the tokenizer's vocabulary.
        vocab_size: usize,
    },
}

/// How one model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Train {
    /// Seed of weights, order and dropout.
    pub seed: u64,
    /// When training ends.
    pub duration: Duration,
    /// The global batch, in examples.
    pub batch_size: usize,
    /// Tokens that go through at once at most; splits the batch, changes no result.
    pub micro_batch_tokens: usize,
    /// Whether a GPU's memory decides how many that are, in their place.
    #[serde(default, skip_serializing_if = "is_default")] // it changes no result
    pub micro_batch_auto: bool,
    /// Micro-batches a batch is split into at least.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's first decay rate.
    pub adam_beta1: f64,
    /// AdamW's second decay rate.
    pub adam_beta2: f64,
    /// AdamW's epsilon.
    pub adam_epsilon: f64,
    /// The global gradient norm is clipped to this; 0 is off.
    pub max_grad_norm: f64,
    /// How the learning rate goes after warm-up.
    pub schedule: Schedule,
    /// How long the learning rate rises.
    pub warmup: Warmup,
    /// Share of the target spread evenly over the labels.
    pub label_smoothing: f64,
    /// Weights of the labels in the loss: `"none"`, `"balanced"`, or a table from label to weight.
    pub class_weights: ClassWeights,
    /// Dropout probability everywhere; left out, the checkpoint's own.
    pub dropout: Option<f64>,
    /// Parameters whose names start with one of these stay as they are.
    pub freeze: Vec<String>,
    /// Each layer's learning rate is the next one's times this; 1 is off.
    pub layer_lr_decay: f64,
    /// When validation runs.
    pub eval: Interval,
    /// When a checkpoint is written.
    pub save: Interval,
    /// Newest checkpoints to keep, beside the best.
    pub keep_checkpoints: usize,
    /// Evaluations without a better one until training ends; 0 is off.
    pub early_stopping_patience: usize,
    /// CPU threads.
    pub threads: usize,
    /// Where it is trained.
    #[serde(default, skip_serializing_if = "is_default")] // runs from before: their hash stays what it was
    pub device: Device,
    /// What products compute in.
    #[serde(default, skip_serializing_if = "is_default")] // as above
    pub dtype: Dtype,
    /// Gradients have the same bits on 1, 2, 4 and 8 processes.
    #[serde(default, skip_serializing_if = "is_default")] // as above
    pub deterministic: bool,
    /// Layers keep their input alone for backward and are computed again there: less memory, more time.
    #[serde(default)] // runs from before there was this key
    pub recompute: bool,
    /// An earlier run's model to start from, as `experiment/run_num/model`.
    pub init_from: Option<String>,
}

/// How many processes train together. What they make depends on it in the last bits alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distributed {
    /// Processes on each machine.
    pub nproc_per_node: Processes,
    /// Seconds that ranks wait for one another.
    pub timeout_s: u64,
    /// Gradients that are summed at once, in MB.
    pub bucket_mb: u64,
}

/// Processes on each machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Processes {
    /// So many.
    Count(usize),
    /// One for each GPU.
    Gpu,
}

impl Default for Distributed {
    fn default() -> Self {
        Self { nproc_per_node: Processes::Count(1), timeout_s: 600, bucket_mb: 25 }
    }
}

/// Where a model is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// On a GPU where this build and the machine have one, else on the CPU.
    #[default]
    Auto,
    /// On the CPU.
    Cpu,
    /// On a GPU for each process.
    Cuda,
}

/// What the products of a model compute in. Weights, their gradients, norms, softmax and the loss are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// Single precision.
    #[default]
    F32,
    /// Single precision, with factors rounded to 10 bits of mantissa; on a GPU.
    Tf32,
    /// bfloat16, as activations are then; on a GPU.
    Bf16,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// When training ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Duration {
    /// After so many passes over the train part.
    Epochs(u64),
    /// After so many optimizer steps.
    Steps(u64),
}

/// How the learning rate goes after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Down to 0 in a line.
    Linear,
    /// Down to 0 in half a cosine.
    Cosine,
    /// As it is.
    Constant,
}

/// How long the learning rate rises from 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// A share of all steps.
    Ratio(f64),
    /// So many steps.
    Steps(u64),
}

/// Weights of the labels in the loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassWeights {
    /// All 1.
    None,
    /// `rows / (labels * rows of the label)`, scikit-learn's `balanced`.
    Balanced,
    /// By label; every label has one.
    Given(BTreeMap<String, f64>),
}

/// How often something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interval {
    /// At the end of each epoch.
    Epoch,
    /// Every so many optimizer steps.
    Steps(u64),
}

/// How models become ONNX files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The ONNX operator set.
    pub opset: u32,
    /// Which quantised model stands beside the fp32 one.
    #[serde(default)] // runs made before the key was there
    pub quantize: Quantize,
}

/// Which quantised model an export makes beside the fp32 one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantize {
    /// None.
    #[default]
    None,
    /// 8-bit integers, activations quantised as they come.
    Int8,
}

/// How exported models are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Infer {
    /// Workers, each with one thread.
    pub workers: usize,
    /// Tokens in one batch at most, padding included.
    pub max_tokens: usize,
}
