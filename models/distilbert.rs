//! DistilBERT for sequence classification (Sanh et al., 2019), with the semantics of transformers'
//! `DistilBertForSequenceClassification`: BERT's encoder without token types, and a head of two layers on
//! the first token.

use serde::{Deserialize, Serialize};

use crate::config::{heads_divide, keys, not_negative, num_labels, parse, probabilities, sizes, supported};
use crate::nn::{
    Builder, Dropout, Embedding, Encoder, EncoderConfig, Init, Inputs, LayerNames, LayerNorm, Linear, Tensor, embed,
    relu,
};
use crate::{Architecture, Model, Result, TokenizerKind};

/// DistilBERT's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "distilbert",
    class_name: "DistilBertForSequenceClassification",
    base_prefix: "distilbert.",
    inputs: &["input_ids", "attention_mask"],
    tokenizer: TokenizerKind::WordPiece,
    tokenizer_class: "DistilBertTokenizer",
    dropout_keys: &["dropout", "attention_dropout", "seq_classif_dropout"],
    config_keys: || keys(&Config::default()),
    max_positions: |config| Ok(Config::parse(config)?.max_position_embeddings),
    build: |config, builder| Ok(Box::new(DistilBert::new(&Config::parse(config)?, num_labels(config)?, builder)?)),
};

const LAYER_NAMES: LayerNames = LayerNames {
    query: "attention.q_lin",
    key: "attention.k_lin",
    value: "attention.v_lin",
    attention_output: "attention.out_lin",
    attention_norm: "sa_layer_norm",
    intermediate: "ffn.lin1",
    output: "ffn.lin2",
    output_norm: "output_layer_norm",
};

/// No key of config.json says it.
const LAYER_NORM_EPS: f64 = 1e-12;

/// What DistilBERT reads of `config.json`; defaults are those of transformers' `DistilBertConfig`.
#[derive(Debug, Deserialize, Serialize)]
struct Config {
    vocab_size: usize,
    dim: usize,
    n_layers: usize,
    n_heads: usize,
    hidden_dim: usize,
    activation: String,
    dropout: f32,
    attention_dropout: f32,
    seq_classif_dropout: f32,
    max_position_embeddings: usize,
    sinusoidal_pos_embds: bool,
    initializer_range: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            dim: 768,
            n_layers: 6,
            n_heads: 12,
            hidden_dim: 3072,
            activation: "gelu".into(),
            dropout: 0.1,
            attention_dropout: 0.1,
            seq_classif_dropout: 0.2,
            max_position_embeddings: 512,
            sinusoidal_pos_embds: false,
            initializer_range: 0.02,
        }
    }
}

impl Config {
    fn parse(config: &crate::Config) -> Result<Self> {
        let config: Self = parse(config)?;
        heads_divide(("dim", config.dim), ("n_heads", config.n_heads))?;
        sizes(&[
            ("vocab_size", config.vocab_size),
            ("dim", config.dim),
            ("n_layers", config.n_layers),
            ("hidden_dim", config.hidden_dim),
            ("max_position_embeddings", config.max_position_embeddings),
        ])?;
        probabilities(&[
            ("dropout", config.dropout),
            ("attention_dropout", config.attention_dropout),
            ("seq_classif_dropout", config.seq_classif_dropout),
        ])?;
        not_negative(&[("initializer_range", config.initializer_range)])?;
        supported("activation", config.activation.as_str(), "gelu")?;
        supported("sinusoidal_pos_embds", config.sinusoidal_pos_embds, false)?;
        Ok(config)
    }

    fn encoder(&self) -> EncoderConfig {
        EncoderConfig {
            layers: self.n_layers,
            hidden_size: self.dim,
            heads: self.n_heads,
            intermediate_size: self.hidden_dim,
            layer_norm_eps: LAYER_NORM_EPS,
            init: Init::Normal(self.initializer_range),
            attention_dropout: self.attention_dropout,
            residual_dropout: [0.0, self.dropout], // after attention there is none
        }
    }
}

struct Embeddings {
    word: Embedding,
    position: Embedding,
    norm: LayerNorm,
    dropout: Dropout,
}

impl Embeddings {
    fn new(config: &Config, b: &Builder) -> Result<Self> {
        let (size, init) = (config.dim, Init::Normal(config.initializer_range));
        Ok(Self {
            word: Embedding::new(config.vocab_size, size, init, &b.scope("word_embeddings"))?,
            position: Embedding::new(config.max_position_embeddings, size, init, &b.scope("position_embeddings"))?,
            norm: LayerNorm::new(size, LAYER_NORM_EPS, &b.scope("LayerNorm"))?,
            dropout: b.dropout(config.dropout),
        })
    }

    fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let x = embed(&[(&self.word, &inputs.ids("input_ids")?), (&self.position, &inputs.sequences.positions(0))])?; // [tokens, dim]
        self.dropout.forward(&self.norm.forward(&x)?, &inputs.sequences)
    }
}

struct DistilBert {
    embeddings: Embeddings,
    transformer: Encoder,
    pre_classifier: Linear,
    dropout: Dropout,
    classifier: Linear,
}

impl DistilBert {
    fn new(config: &Config, num_labels: usize, b: &Builder) -> Result<Self> {
        let init = Init::Normal(config.initializer_range);
        let (distilbert, size, top) = (b.scope("distilbert"), config.dim, config.n_layers + 1);
        Ok(Self {
            embeddings: Embeddings::new(config, &distilbert.scope("embeddings").depth(0))?,
            transformer: Encoder::new(&config.encoder(), &LAYER_NAMES, &distilbert.scope("transformer"))?,
            pre_classifier: Linear::new(size, size, init, &b.scope("pre_classifier").depth(top))?,
            dropout: b.dropout(config.seq_classif_dropout),
            classifier: Linear::new(size, num_labels, init, &b.scope("classifier").depth(top).head())?,
        })
    }
}

impl Model for DistilBert {
    fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let x = self.embeddings.forward(inputs)?; // [tokens, dim]
        let first = self.transformer.first_tokens(x, inputs)?; // [sequences, dim]
        let x = relu(&self.pre_classifier.forward(&first)?)?;
        self.classifier.forward(&self.dropout.forward(&x, &inputs.sequences)?) // [sequences, num_labels]
    }
}
