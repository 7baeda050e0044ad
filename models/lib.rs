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

mod config;

pub mod bert;
pub mod distilbert;
pub mod electra;
pub mod nn;
pub mod roberta;
pub mod xlm_roberta;

pub use config::{Config, num_labels};

use nn::{Builder, Graph, Inputs, Mode, Packing, Parameters, Plan, Tensor};
use serde_json::Value as Json;

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
    /// The tokenizer that a model from scratch gets.
    pub tokenizer: TokenizerKind,
    /// The class that transformers loads that tokenizer with.
    pub tokenizer_class: &'static str,
    /// The keys of `config.json` that hold dropout probabilities.
    pub dropout_keys: &'static [&'static str],
    /// The keys of `config.json` that the model reads.
    pub config_keys: fn() -> Vec<String>,
    /// The longest sequence that the model can read, in tokens.
    pub max_positions: fn(&Config) -> Result<usize>,
    /// Declares the parameters and returns the model.
    pub build: fn(&Config, &Builder) -> Result<Box<dyn Model>>,
}

/// The kinds of tokenizers that the architectures' published checkpoints have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizerKind {
    /// Lower-case words in pieces, `[CLS] … [SEP]`: BERT's (Wu et al., 2016).
    WordPiece,
    /// Byte-pair encoding of UTF-8, `<s> … </s>`: RoBERTa's (Radford et al., 2019).
    ByteLevelBpe,
    /// The likeliest pieces, `<s> … </s>`: XLM-RoBERTa's (Kudo, 2018).
    Unigram,
}

impl TokenizerKind {
    /// Its name, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::WordPiece => "wordpiece",
            Self::ByteLevelBpe => "byte-level-bpe",
            Self::Unigram => "unigram",
        }
    }
}

/// Every architecture there is: one line each.
pub static ARCHITECTURES: &[&Architecture] = &[
    &bert::ARCHITECTURE,
    &distilbert::ARCHITECTURE,
    &electra::ARCHITECTURE,
    &roberta::ARCHITECTURE,
    &xlm_roberta::ARCHITECTURE,
];

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
            .filter(|name| !["lib", "config"].contains(&name.as_str()))
            .collect();
        files.sort();
        let mut registered: Vec<_> = ARCHITECTURES.iter().map(|a| a.model_type.replace('-', "_")).collect();
        registered.sort();
        assert_eq!(files, registered, "a file in models/ needs its line in ARCHITECTURES");
    }

    #[test]
    fn an_unknown_architecture_names_the_nearest() {
        let error = architecture("brt").err().unwrap().to_string();
        assert_eq!(
            error,
            "model_type \"brt\" is not known; known are: bert, distilbert, electra, roberta, xlm-roberta; did you mean \"bert\"?"
        );
    }

    fn config(json: serde_json::Value) -> Config {
        json.as_object().unwrap().clone()
    }

    /// config.json of published checkpoints as transformers 4 wrote them, and how many parameters transformers
    /// gives a classifier of two labels that is made of them.
    #[test]
    fn published_configs_make_models_of_their_size() {
        let distilbert = serde_json::json!({
            "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768,
            "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02, "max_position_embeddings": 512,
            "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
            "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": false, "tie_weights_": true,
            "transformers_version": "4.10.0.dev0", "vocab_size": 30522,
        });
        let electra = serde_json::json!({
            "architectures": ["ElectraForPreTraining"], "attention_probs_dropout_prob": 0.1, "embedding_size": 128,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 256, "initializer_range": 0.02,
            "intermediate_size": 1024, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
            "model_type": "electra", "num_attention_heads": 4, "num_hidden_layers": 12, "type_vocab_size": 2,
            "vocab_size": 30522,
        });
        let roberta = serde_json::json!({
            "architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
            "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
            "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 514, "model_type": "roberta", "num_attention_heads": 12,
            "num_hidden_layers": 12, "pad_token_id": 1, "position_embedding_type": "absolute",
            "torch_dtype": "float32", "type_vocab_size": 1, "vocab_size": 50265,
        });
        let mut xlm_roberta = config(roberta.clone());
        xlm_roberta.extend(config(serde_json::json!({ "model_type": "xlm-roberta", "vocab_size": 250_002 })));
        for (config, elements, positions) in [
            (config(distilbert), 66_955_010, 512),
            (config(electra), 13_549_314, 512),
            (config(roberta), 124_647_170, 512),
            (xlm_roberta, 278_045_186, 512),
        ] {
            let built = declare(&config).unwrap();
            assert_eq!(built.parameters.elements(), elements, "{}", built.architecture.model_type);
            assert_eq!((built.architecture.max_positions)(&config).unwrap(), positions);
        }
    }

    #[test]
    fn what_a_model_cannot_follow_is_named() {
        for (model_type, key, value, wanted) in [
            ("bert", "hidden_act", "relu".into(), "hidden_act = \"relu\" is not supported; \"gelu\" is"),
            ("electra", "hidden_act", "gelu_new".into(), "hidden_act = \"gelu_new\" is not supported; \"gelu\" is"),
            ("distilbert", "activation", "relu".into(), "activation = \"relu\" is not supported; \"gelu\" is"),
            (
                "distilbert",
                "sinusoidal_pos_embds",
                true.into(),
                "sinusoidal_pos_embds = true is not supported; false is",
            ),
            ("distilbert", "seq_classif_dropout", 1.5.into(), "seq_classif_dropout = 1.5: needs to be in [0, 1)"),
            ("distilbert", "n_heads", 7.into(), "dim = 768 is no multiple of n_heads = 7"),
            ("electra", "embedding_size", 0.into(), "embedding_size = 0: needs at least 1"),
            ("electra", "classifier_dropout", 1.into(), "classifier_dropout = 1: needs to be in [0, 1)"),
            (
                "roberta",
                "position_embedding_type",
                "relative_key".into(),
                "position_embedding_type = \"relative_key\" is not supported; \"absolute\" is",
            ),
            ("xlm-roberta", "is_decoder", true.into(), "is_decoder = true is not supported; false is"),
            (
                "xlm-roberta",
                "max_position_embeddings",
                2.into(),
                "max_position_embeddings = 2: the positions up to pad_token_id = 1 are reserved, so it needs to be above 2",
            ),
            ("roberta", "pad_token_id", Json::Null, "pad_token_id = null: invalid type: null, expected usize"),
            (
                "bert",
                "hidden_size",
                "wide".into(),
                "hidden_size = \"wide\": invalid type: string \"wide\", expected usize",
            ),
        ] {
            let mut config = Config::from_iter([("model_type".to_owned(), model_type.into())]);
            config.insert(key.into(), value);
            let error = declare(&config).err().map(|e| e.to_string());
            assert_eq!(error.as_deref(), Some(&*format!("config.json: {wanted}")), "{model_type}");
        }
    }

    /// Two sequences give what each gives alone: positions begin anew, and no token type comes from nowhere.
    #[test]
    fn a_sequence_does_not_see_its_neighbours() {
        for architecture in ARCHITECTURES {
            let mut config = Config::from_iter([("model_type".to_owned(), architecture.model_type.into())]);
            for (keys, size) in [
                (["vocab_size", "vocab_size"], 30),
                (["hidden_size", "dim"], 16),
                (["num_hidden_layers", "n_layers"], 2),
                (["num_attention_heads", "n_heads"], 2),
                (["intermediate_size", "hidden_dim"], 32),
            ] {
                config.extend(keys.map(|key| (key.to_owned(), size.into())));
            }
            config.insert("initializer_range".into(), 0.3.into());
            let built = build(&config, 5).unwrap();
            let logits = |offsets: Vec<u32>, ids: &[u32]| {
                let packing = Packing::new(offsets.clone(), (1..offsets.len() as u64).collect()).unwrap();
                let inputs = Inputs::packed(packing, vec![("input_ids", ids.to_vec())], Mode::Evaluate).unwrap();
                built.model.forward(&inputs).unwrap().data().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let ids = [2, 7, 9, 3, 2, 8, 3];
            let alone = [logits(vec![0, 4], &ids[..4]), logits(vec![0, 3], &ids[4..])].concat();
            let together = logits(vec![0, 4, 7], &ids);
            assert!(together.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-6), "{}", architecture.model_type);
            assert!(together.iter().all(|logit| logit.abs() > 1e-3));
        }
    }
}
