//! Transformer classifiers, each written once as plain structs with a plain `forward`.
//!
//! One architecture is one file (see [`bert`]) and one line of [`ARCHITECTURES`]. A model is built
//! from a parsed `config.json` by declaring its parameters to a [`nn::Builder`]; its `forward` is
//! read three times: on packed batches it computes and records a tape ([`nn::Tape`]), on symbols it
//! writes the graph that is exported ([`capture`]), and on sizes it says what a batch will cost
//! ([`plan`]). This crate sees no file path, rank or device flag.
//!
//! ```
//! use kiln_models::nn::{Inputs, Mode, Packing};
//!
//! let config = serde_json::json!({
//!     "model_type": "bert", "num_labels": 3, "vocab_size": 30, "hidden_size": 8,
//!     "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
//! });
//! let config = config.as_object().unwrap();
//! let bert = kiln_models::build(config, 42)?;
//!
//! // Two sequences, of four tokens and of two, one after the other: no padding.
//! let packing = Packing::new(vec![0, 4, 6], vec![0, 1])?;
//! let inputs = Inputs::packed(packing, vec![("input_ids", vec![2, 7, 9, 3, 2, 3])], Mode::Evaluate)?;
//! let logits = bert.model.forward(&inputs)?;
//! assert_eq!(logits.data()?.dims(), [2, 3]);
//!
//! // The same forward, on symbols.
//! let graph = kiln_models::capture(&bert, config)?;
//! assert_eq!(graph.outputs[0].name, "logits");
//! # Ok::<(), kiln_models::Error>(())
//! ```
#![warn(missing_docs)]

pub mod bert;
pub mod nn;

use nn::{Builder, Graph, Inputs, Mode, Packing, Parameters, Plan, Tensor};
use serde_json::{Map, Value as Json};

/// A parsed `config.json`.
pub type Config = Map<String, Json>;

/// What can go wrong in building or running a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No architecture has this `model_type`.
    #[error("model_type {got:?} is not known; known are: {known}{nearest}")]
    UnknownArchitecture {
        /// The `model_type` asked for.
        got: String,
        /// The ones there are.
        known: String,
        /// `; did you mean …?`, or nothing.
        nearest: String,
    },
    /// A `config.json` that this architecture cannot follow.
    #[error("config.json: {0}")]
    Config(String),
    /// A tensor of a checkpoint does not have the parameter's shape.
    #[error(
        "tensor {name:?} is {got:?} in the checkpoint, but config.json makes it {expected:?}; \
         the two files do not belong together"
    )]
    Shape {
        /// The tensor's name in the checkpoint.
        name: String,
        /// Its shape there.
        got: Vec<usize>,
        /// The shape that the model needs.
        expected: Vec<usize>,
    },
    /// Inputs that do not fit the model.
    #[error("{0}")]
    Input(String),
    /// A kernel's error.
    #[error(transparent)]
    Kernel(#[from] candle_core::Error),
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A sequence classifier: input columns to logits.
pub trait Model: Send + Sync {
    /// Logits of each sequence: `[sequences, num_labels]` on values, `[batch, num_labels]` on symbols.
    fn forward(&self, inputs: &Inputs) -> Result<Tensor>;
}

/// What the registry knows of an architecture.
pub struct Architecture {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class that transformers loads it with.
    pub class_name: &'static str,
    /// The prefix that a base model's checkpoint leaves out (`bert.`).
    pub base_prefix: &'static str,
    /// The input columns that `forward` reads, in Hugging Face's order.
    pub inputs: &'static [&'static str],
    /// The keys of `config.json` that hold dropout probabilities.
    pub dropout_keys: &'static [&'static str],
    /// The keys of `config.json` that the model reads.
    pub config_keys: fn() -> Vec<String>,
    /// The longest sequence that the model can read, in tokens.
    pub max_positions: fn(&Config) -> Result<usize>,
    /// Declares the parameters and returns the model.
    pub build: fn(&Config, &Builder) -> Result<Box<dyn Model>>,
}

/// Every architecture there is: one line each.
pub static ARCHITECTURES: &[&Architecture] = &[&bert::ARCHITECTURE];

/// The architecture of a `model_type`.
///
/// # Errors
/// [`Error::UnknownArchitecture`], with the known ones and the nearest.
pub fn architecture(model_type: &str) -> Result<&'static Architecture> {
    ARCHITECTURES.iter().find(|a| a.model_type == model_type).copied().ok_or_else(|| {
        let known: Vec<_> = ARCHITECTURES.iter().map(|a| a.model_type).collect();
        let nearest = known
            .iter()
            .map(|k| (strsim::normalized_damerau_levenshtein(k, model_type), k))
            .filter(|(score, _)| *score >= 0.5)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, k)| format!("; did you mean {k:?}?"));
        Error::UnknownArchitecture {
            got: model_type.to_owned(),
            known: known.join(", "),
            nearest: nearest.unwrap_or_default(),
        }
    })
}

/// A model with its parameters' storage.
pub struct Built {
    /// What the registry knows of it.
    pub architecture: &'static Architecture,
    /// The forward.
    pub model: Box<dyn Model>,
    /// Values and gradients, in order of declaration.
    pub parameters: Parameters,
}

/// Builds the model that `config` describes, its parameters freshly initialised from `seed`.
///
/// # Errors
/// An unknown `model_type`, or a config that the architecture cannot follow.
pub fn build(config: &Config, seed: u64) -> Result<Built> {
    build_by(config, |builder| builder.finish(seed))
}

/// The model that `config` describes without values: to be captured or planned, not computed.
///
/// # Errors
/// As [`build`]'s.
pub fn declare(config: &Config) -> Result<Built> {
    build_by(config, |builder| Ok(builder.declared()))
}

fn build_by(config: &Config, finish: impl FnOnce(Builder) -> Result<Parameters>) -> Result<Built> {
    let model_type =
        config.get("model_type").and_then(Json::as_str).ok_or_else(|| Error::Config("model_type is missing".into()))?;
    let architecture = architecture(model_type)?;
    let builder = Builder::new();
    let model = (architecture.build)(config, &builder)?;
    Ok(Built { architecture, model, parameters: finish(builder)? })
}

/// Reads `forward` once on symbols: the model as an ONNX graph with symbolic `batch` and `sequence`.
///
/// # Errors
/// What an op's ONNX form refuses.
pub fn capture(built: &Built, config: &Config) -> Result<Graph> {
    let max_positions = (built.architecture.max_positions)(config)?;
    nn::capture(built.architecture.inputs, max_positions, |inputs| built.model.forward(inputs))
}

/// Reads `forward` once on sizes: what a batch of sequences as `packing` has them will cost, in training
/// with its backward.
///
/// # Errors
/// Shapes that do not fit.
pub fn plan(built: &Built, packing: Packing, mode: Mode, recompute: bool) -> Result<Plan> {
    nn::plan(built.architecture.inputs, packing, mode, recompute, |inputs| built.model.forward(inputs))
}

/// The keys that a config struct reads, from its defaults.
fn keys(defaults: &impl serde::Serialize) -> Vec<String> {
    match serde_json::to_value(defaults) {
        Ok(Json::Object(keys)) => keys.into_iter().map(|(key, _)| key).collect(),
        _ => Vec::new(),
    }
}

/// The number of labels that `config` gives: of `id2label`, else `num_labels`, else 2.
///
/// # Errors
/// An `id2label` that is not a table.
pub fn num_labels(config: &Config) -> Result<usize> {
    match (config.get("id2label"), config.get("num_labels")) {
        (Some(Json::Object(labels)), _) => Ok(labels.len()),
        (Some(other), _) if !other.is_null() => {
            Err(Error::Config(format!("id2label = {other}: needs to be a table of id to label")))
        }
        (_, Some(n)) => n
            .as_u64()
            .map(|n| n as usize)
            .ok_or_else(|| Error::Config(format!("num_labels = {n}: needs to be a whole number"))),
        _ => Ok(2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_a_model_is_registered() {
        let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut files: Vec<String> = std::fs::read_dir(here)
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
            .filter_map(|name| name.strip_suffix(".rs").map(str::to_owned))
            .filter(|name| name != "lib")
            .collect();
        files.sort();
        let mut registered: Vec<_> = ARCHITECTURES.iter().map(|a| a.model_type.to_owned()).collect();
        registered.sort();
        assert_eq!(files, registered, "a file in models/ needs its line in ARCHITECTURES");
    }

    #[test]
    fn an_unknown_architecture_names_the_nearest() {
        let error = architecture("brt").err().unwrap().to_string();
        assert_eq!(error, "model_type \"brt\" is not known; known are: bert; did you mean \"bert\"?");
    }
}
