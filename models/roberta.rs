//! RoBERTa for sequence classification (Liu et al., 2019), with the semantics of transformers'
//! `RobertaForSequenceClassification`: BERT's encoder, positions that begin after the padding's, one
//! token type, and a head of two layers on `<s>`.

use serde::{Deserialize, Serialize};

use crate::bert::{self, LAYER_NAMES};
use crate::config::{keys, num_labels, parse};
use crate::nn::{Builder, Dropout, Embedding, Encoder, Inputs, LayerNorm, Linear, Tensor, embed, tanh};
use crate::{Architecture, Error, Model, Result, TokenizerKind};

/// RoBERTa's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "roberta",
    class_name: "RobertaForSequenceClassification",
    base_prefix: "roberta.",
    inputs: &["input_ids", "attention_mask"],
    tokenizer: TokenizerKind::ByteLevelBpe,
    tokenizer_class: "RobertaTokenizer",
    dropout_keys: &["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"],
    config_keys: || keys(&Config::default()),
    max_positions: |config| Config::parse(config)?.max_positions(),
    build: |config, builder| Ok(Box::new(Roberta::new(&Config::parse(config)?, num_labels(config)?, builder)?)),
};

/// What RoBERTa reads of `config.json`: BERT's keys and the padding's id. Defaults are those of transformers'
/// `RobertaConfig`.
#[derive(Debug, Deserialize, Serialize)]
struct Config {
    #[serde(flatten)]
    bert: bert::Config,
    pad_token_id: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { bert: bert::Config { vocab_size: 50265, ..bert::Config::default() }, pad_token_id: 1 }
    }
}

impl Config {
    fn parse(config: &crate::Config) -> Result<Self> {
        let config: Self = parse(config)?;
        config.bert.check()?;
        config.max_positions()?;
        Ok(config)
    }

    /// The position of a first token: those up to the padding's are reserved.
    fn first_position(&self) -> usize {
        self.pad_token_id.saturating_add(1)
    }

    fn max_positions(&self) -> Result<usize> {
        let (all, first) = (self.bert.max_position_embeddings, self.first_position());
        all.checked_sub(first).filter(|&positions| positions > 0).ok_or_else(|| {
            Error::Config(format!(
                "max_position_embeddings = {all}: the positions up to pad_token_id = {} are reserved, so it needs to be \
                 above {first}",
                self.pad_token_id
            ))
        })
    }
}

struct Embeddings {
    word: Embedding,
    position: Embedding,
    token_type: Embedding,
    first_position: usize,
    norm: LayerNorm,
    dropout: Dropout,
}

impl Embeddings {
    fn new(config: &Config, b: &Builder) -> Result<Self> {
        let (bert, size, init) = (&config.bert, config.bert.hidden_size, config.bert.init());
        Ok(Self {
            word: Embedding::new(bert.vocab_size, size, init, &b.scope("word_embeddings"))?,
            position: Embedding::new(bert.max_position_embeddings, size, init, &b.scope("position_embeddings"))?,
            token_type: Embedding::new(bert.type_vocab_size, size, init, &b.scope("token_type_embeddings"))?,
            first_position: config.first_position(),
            norm: LayerNorm::new(size, bert.layer_norm_eps, &b.scope("LayerNorm"))?,
            dropout: b.dropout(bert.hidden_dropout_prob),
        })
    }

    fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let x = embed(&[
            (&self.word, &inputs.ids("input_ids")?),
            (&self.position, &inputs.sequences.positions(self.first_position)),
            (&self.token_type, &inputs.sequences.zeros()),
        ])?; // [tokens, hidden_size]
        self.dropout.forward(&self.norm.forward(&x)?, &inputs.sequences)
    }
}

struct Roberta {
    embeddings: Embeddings,
    encoder: Encoder,
    dense: Linear,
    out_proj: Linear,
    dropout: [Dropout; 2],
}

impl Roberta {
    fn new(config: &Config, num_labels: usize, b: &Builder) -> Result<Self> {
        let (roberta, size, init) = (b.scope("roberta"), config.bert.hidden_size, config.bert.init());
        let top = config.bert.num_hidden_layers + 1;
        Ok(Self {
            embeddings: Embeddings::new(config, &roberta.scope("embeddings").depth(0))?,
            encoder: Encoder::new(&config.bert.encoder(), &LAYER_NAMES, &roberta.scope("encoder"))?,
            dense: Linear::new(size, size, init, &b.scope("classifier.dense").depth(top))?,
            out_proj: Linear::new(size, num_labels, init, &b.scope("classifier.out_proj").depth(top).head())?,
            dropout: [(); 2].map(|()| b.dropout(config.bert.classifier_dropout())),
        })
    }
}

impl Model for Roberta {
    fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let sequences = &inputs.sequences;
        let x = self.embeddings.forward(inputs)?; // [tokens, hidden_size]
        let first = self.encoder.first_tokens(x, inputs)?; // [sequences, hidden_size]
        let x = tanh(&self.dense.forward(&self.dropout[0].forward(&first, sequences)?)?)?;
        self.out_proj.forward(&self.dropout[1].forward(&x, sequences)?) // [sequences, num_labels]
    }
}
