//! BERT for sequence classification (Devlin et al., 2018), with the semantics of transformers'
//! `BertForSequenceClassification`: a pooler on the first token, dropout, a linear classifier.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::nn::{
    Attention, Builder, Dropout, Embedding, Init, Inputs, LayerNorm, Linear, Sequences, Tensor, embed, first_token,
    gelu, recompute, tanh,
};
use crate::{Architecture, Error, Model, Result, num_labels};

/// BERT's line in the registry.
pub static ARCHITECTURE: Architecture = Architecture {
    model_type: "bert",
    class_name: "BertForSequenceClassification",
    base_prefix: "bert.",
    inputs: &["input_ids", "attention_mask", "token_type_ids"],
    dropout_keys: &["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"],
    config_keys: || crate::keys(&Config::default()),
    max_positions: |config| Ok(Config::parse(config)?.max_position_embeddings),
    build: |config, builder| Ok(Box::new(Bert::new(&Config::parse(config)?, num_labels(config)?, builder)?)),
};

/// What BERT reads of `config.json`; defaults are those of transformers' `BertConfig`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(default)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    hidden_act: String,
    hidden_dropout_prob: f32,
    attention_probs_dropout_prob: f32,
    classifier_dropout: Option<f32>,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    initializer_range: f64,
    layer_norm_eps: f64,
    position_embedding_type: String,
    is_decoder: bool,
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
        let config: Self =
            serde_json::from_value(Json::Object(config.clone())).map_err(|e| Error::Config(e.to_string()))?;
        let refuse = |what: String| Err(Error::Config(what));
        if config.num_attention_heads == 0 || !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            return refuse(format!(
                "hidden_size = {} is no multiple of num_attention_heads = {}",
                config.hidden_size, config.num_attention_heads
            ));
        }
        for (key, size) in [
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("intermediate_size", config.intermediate_size),
            ("max_position_embeddings", config.max_position_embeddings),
            ("type_vocab_size", config.type_vocab_size),
        ] {
            if size == 0 {
                return refuse(format!("{key} = 0: needs at least 1"));
            }
        }
        for (key, probability) in [
            ("hidden_dropout_prob", Some(config.hidden_dropout_prob)),
            ("attention_probs_dropout_prob", Some(config.attention_probs_dropout_prob)),
            ("classifier_dropout", config.classifier_dropout),
        ] {
            if probability.is_some_and(|p| !(0.0..1.0).contains(&p)) {
                return refuse(format!("{key} = {}: needs to be in [0, 1)", probability.unwrap_or_default()));
            }
        }
        if config.hidden_act != "gelu" {
            return refuse(format!("hidden_act = {:?} is not supported; \"gelu\" (erf) is", config.hidden_act));
        }
        if config.position_embedding_type != "absolute" {
            return refuse(format!(
                "position_embedding_type = {:?} is not supported; \"absolute\" is",
                config.position_embedding_type
            ));
        }
        if config.is_decoder {
            return refuse("is_decoder = true: a classifier needs an encoder".into());
        }
        Ok(config)
    }
}

struct Embeddings {
    word: Embedding,
    position: Embedding,
    token_type: Embedding,
    norm: LayerNorm,
    dropout: Dropout,
}

impl Embeddings {
    fn new(config: &Config, b: &Builder) -> Result<Self> {
        let init = Init::Normal(config.initializer_range);
        let size = config.hidden_size;
        Ok(Self {
            word: Embedding::new(config.vocab_size, size, init, &b.scope("word_embeddings"))?,
            position: Embedding::new(config.max_position_embeddings, size, init, &b.scope("position_embeddings"))?,
            token_type: Embedding::new(config.type_vocab_size, size, init, &b.scope("token_type_embeddings"))?,
            norm: LayerNorm::new(size, config.layer_norm_eps, &b.scope("LayerNorm"))?,
            dropout: b.dropout(config.hidden_dropout_prob),
        })
    }

    fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let x = embed(&[
            (&self.word, &inputs.ids("input_ids")?),
            (&self.position, &inputs.sequences.positions()),
            (&self.token_type, &inputs.ids("token_type_ids")?),
        ])?; // [tokens, hidden_size]
        self.dropout.forward(&self.norm.forward(&x)?, &inputs.sequences)
    }
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention: Attention,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
    dropout: [Dropout; 2],
}

impl Layer {
    fn new(config: &Config, b: &Builder) -> Result<Self> {
        let init = Init::Normal(config.initializer_range);
        let (size, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let this = b.scope("attention").scope("self");
        let (attended, output) = (b.scope("attention").scope("output"), b.scope("output"));
        Ok(Self {
            query: Linear::new(size, size, init, &this.scope("query"))?,
            key: Linear::new(size, size, init, &this.scope("key"))?,
            value: Linear::new(size, size, init, &this.scope("value"))?,
            attention: Attention::new(
                config.num_attention_heads,
                size / config.num_attention_heads,
                b.dropout(config.attention_probs_dropout_prob),
            ),
            attention_output: Linear::new(size, size, init, &attended.scope("dense"))?,
            attention_norm: LayerNorm::new(size, eps, &attended.scope("LayerNorm"))?,
            intermediate: Linear::new(size, inner, init, &b.scope("intermediate").scope("dense"))?,
            output: Linear::new(inner, size, init, &output.scope("dense"))?,
            output_norm: LayerNorm::new(size, eps, &output.scope("LayerNorm"))?,
            dropout: [b.dropout(config.hidden_dropout_prob), b.dropout(config.hidden_dropout_prob)],
        })
    }

    /// `[tokens, hidden_size]` to the same.
    fn forward(&self, x: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        self.rows(x, x, sequences)
    }

    /// `[tokens, hidden_size]` to each sequence's first row of [`forward`](Self::forward).
    fn first_tokens(&self, x: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        self.rows(x, &first_token(x, sequences)?, sequences)
    }

    /// What becomes of some `rows` of `x`.
    fn rows(&self, x: &Tensor, rows: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        let (q, k, v) = (self.query.forward(rows)?, self.key.forward(x)?, self.value.forward(x)?);
        let attended = self.attention_output.forward(&self.attention.forward(&q, &k, &v, sequences)?)?;
        let x = self.attention_norm.residual(&attended, rows, &self.dropout[0], sequences)?;
        let inner = gelu(&self.intermediate.forward(&x)?)?; // [rows, intermediate_size]
        self.output_norm.residual(&self.output.forward(&inner)?, &x, &self.dropout[1], sequences)
    }
}

struct Bert {
    embeddings: Embeddings,
    layers: Vec<Arc<Layer>>,
    pooler: Linear,
    dropout: Dropout,
    classifier: Linear,
}

impl Bert {
    fn new(config: &Config, num_labels: usize, b: &Builder) -> Result<Self> {
        let init = Init::Normal(config.initializer_range);
        let (bert, size, depth) = (b.scope("bert"), config.hidden_size, config.num_hidden_layers);
        let layer = |i: usize| {
            Layer::new(config, &bert.scope("encoder").scope(&format!("layer.{i}")).depth(i + 1)).map(Arc::new)
        };
        Ok(Self {
            embeddings: Embeddings::new(config, &bert.scope("embeddings").depth(0))?,
            layers: (0..depth).map(layer).collect::<Result<_>>()?,
            pooler: Linear::new(size, size, init, &bert.scope("pooler").scope("dense").depth(depth + 1))?,
            dropout: b.dropout(config.classifier_dropout.unwrap_or(config.hidden_dropout_prob)),
            classifier: Linear::new(size, num_labels, init, &b.scope("classifier").depth(depth + 1).head())?,
        })
    }
}

impl Model for Bert {
    fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let sequences = &inputs.sequences;
        let mut x = self.embeddings.forward(inputs)?;
        inputs.hidden_state(&x);
        let shows_all = inputs.keeps_hidden_states();
        for (i, layer) in self.layers.iter().enumerate() {
            // Only first tokens are pooled: unless all are to be shown, the last layer makes no other row.
            let all = shows_all || i + 1 < self.layers.len();
            x = recompute(layer, &x, sequences, if all { Layer::forward } else { Layer::first_tokens })?;
            inputs.hidden_state(&x);
        }
        let first = if shows_all { first_token(&x, sequences)? } else { x };
        let pooled = tanh(&self.pooler.forward(&first)?)?; // [sequences, hidden_size]
        self.classifier.forward(&self.dropout.forward(&pooled, sequences)?) // [sequences, num_labels]
    }
}
