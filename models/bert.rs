//! BERT for sequence classification (Devlin et al., 2018), with the semantics of transformers'
//! `BertForSequenceClassification`: a pooler on the first token, dropout, a linear classifier.

use serde::{Deserialize, Serialize};

use crate::config::{heads_divide, keys, not_negative, num_labels, parse, probabilities, sizes, supported};
use crate::nn::{
    Builder, Dropout, Embedding, Encoder, EncoderConfig, Init, Inputs, LayerNames, LayerNorm, Linear, Tensor, embed,
    tanh,
};
use crate::{Architecture, Model, Result, TokenizerKind};

/// BERT's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "bert",
    class_name: "BertForSequenceClassification",
    base_prefix: "bert.",
    inputs: &["input_ids", "attention_mask", "token_type_ids"],
    tokenizer: TokenizerKind::WordPiece,
    tokenizer_class: "BertTokenizer",
    dropout_keys: &["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"],
    config_keys: || keys(&Config::default()),
    max_positions: |config| Ok(Config::parse(config)?.max_position_embeddings),
    build: |config, builder| Ok(Box::new(Bert::new(&Config::parse(config)?, num_labels(config)?, builder)?)),
};

/// Where a layer of BERT, of RoBERTa and of ELECTRA has its parts.
pub(crate) const LAYER_NAMES: LayerNames = LayerNames {
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    intermediate: "intermediate.dense",
    output: "output.dense",
    output_norm: "output.LayerNorm",
};

/// What BERT reads of `config.json`, and its kin too; defaults are those of transformers' `BertConfig`.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub hidden_act: String,
    pub hidden_dropout_prob: f32,
    pub attention_probs_dropout_prob: f32,
    pub classifier_dropout: Option<f32>,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub position_embedding_type: String,
    pub is_decoder: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            classifier_dropout: None,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            position_embedding_type: "absolute".into(),
            is_decoder: false,
        }
    }
}

impl Config {
    fn parse(config: &crate::Config) -> Result<Self> {
        let config: Self = parse(config)?;
        config.check()?;
        Ok(config)
    }

    /// Refuses what the model is not written for.
    pub fn check(&self) -> Result<()> {
        heads_divide(("hidden_size", self.hidden_size), ("num_attention_heads", self.num_attention_heads))?;
        sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ])?;
        probabilities(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("classifier_dropout", self.classifier_dropout()),
        ])?;
        not_negative(&[("initializer_range", self.initializer_range), ("layer_norm_eps", self.layer_norm_eps)])?;
        supported("hidden_act", self.hidden_act.as_str(), "gelu")?; // by erf
        supported("position_embedding_type", self.position_embedding_type.as_str(), "absolute")?;
        supported("is_decoder", self.is_decoder, false)
    }

    pub fn init(&self) -> Init {
        Init::Normal(self.initializer_range)
    }

    pub fn classifier_dropout(&self) -> f32 {
        self.classifier_dropout.unwrap_or(self.hidden_dropout_prob)
    }

    pub fn encoder(&self) -> EncoderConfig {
        EncoderConfig {
            layers: self.num_hidden_layers,
            hidden_size: self.hidden_size,
            heads: self.num_attention_heads,
            intermediate_size: self.intermediate_size,
            layer_norm_eps: self.layer_norm_eps,
            init: self.init(),
            attention_dropout: self.attention_probs_dropout_prob,
            residual_dropout: [self.hidden_dropout_prob; 2],
        }
    }
}

pub(crate) struct Embeddings {
    word: Embedding,
    position: Embedding,
    token_type: Embedding,
    norm: LayerNorm,
    dropout: Dropout,
}

impl Embeddings {
    /// Tables of rows of `size`.
    pub fn new(config: &Config, size: usize, b: &Builder) -> Result<Self> {
        let init = config.init();
        Ok(Self {
            word: Embedding::new(config.vocab_size, size, init, &b.scope("word_embeddings"))?,
            position: Embedding::new(config.max_position_embeddings, size, init, &b.scope("position_embeddings"))?,
            token_type: Embedding::new(config.type_vocab_size, size, init, &b.scope("token_type_embeddings"))?,
            norm: LayerNorm::new(size, config.layer_norm_eps, &b.scope("LayerNorm"))?,
            dropout: b.dropout(config.hidden_dropout_prob),
        })
    }

    /// `[tokens, size]`.
    pub fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let x = embed(&[
            (&self.word, &inputs.ids("input_ids")?),
            (&self.position, &inputs.sequences.positions(0)),
            (&self.token_type, &inputs.ids("token_type_ids")?),
        ])?;
        self.dropout.forward(&self.norm.forward(&x)?, &inputs.sequences)
    }
}

struct Bert {
    embeddings: Embeddings,
    encoder: Encoder,
    pooler: Linear,
    dropout: Dropout,
    classifier: Linear,
}

impl Bert {
    fn new(config: &Config, num_labels: usize, b: &Builder) -> Result<Self> {
        let (bert, size, init) = (b.scope("bert"), config.hidden_size, config.init());
        let top = config.num_hidden_layers + 1;
        Ok(Self {
            embeddings: Embeddings::new(config, size, &bert.scope("embeddings").depth(0))?,
            encoder: Encoder::new(&config.encoder(), &LAYER_NAMES, &bert.scope("encoder"))?,
            pooler: Linear::new(size, size, init, &bert.scope("pooler.dense").depth(top))?,
            dropout: b.dropout(config.classifier_dropout()),
            classifier: Linear::new(size, num_labels, init, &b.scope("classifier").depth(top).head())?,
        })
    }
}

impl Model for Bert {
    fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let x = self.embeddings.forward(inputs)?; // [tokens, hidden_size]
        let first = self.encoder.first_tokens(x, inputs)?; // [sequences, hidden_size]
        let pooled = tanh(&self.pooler.forward(&first)?)?;
        self.classifier.forward(&self.dropout.forward(&pooled, &inputs.sequences)?) // [sequences, num_labels]
    }
}
