//! ELECTRA for sequence classification (Clark et al., 2020), with the semantics of transformers'
//! `ElectraForSequenceClassification`: BERT's encoder, embeddings of a width of their own, and a head of
//! two layers on the first token.

use serde::{Deserialize, Serialize};

use crate::bert::{self, Embeddings, LAYER_NAMES};
use crate::config::{keys, num_labels, parse, sizes};
use crate::nn::{Builder, Dropout, Encoder, Inputs, Linear, Tensor, gelu};
use crate::{Architecture, Model, Result, TokenizerKind};

/// ELECTRA's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "electra",
    class_name: "ElectraForSequenceClassification",
    base_prefix: "electra.",
    inputs: &["input_ids", "attention_mask", "token_type_ids"],
    tokenizer: TokenizerKind::WordPiece,
    tokenizer_class: "BertTokenizer", // transformers 5 has no class of ELECTRA's own
    dropout_keys: &["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"],
    config_keys: || keys(&Config::default()),
    max_positions: |config| Ok(Config::parse(config)?.bert.max_position_embeddings),
    build: |config, builder| Ok(Box::new(Electra::new(&Config::parse(config)?, num_labels(config)?, builder)?)),
};

/// What ELECTRA reads of `config.json`: BERT's keys and `embedding_size`. Defaults are those of transformers'
/// `ElectraConfig`; its `summary_…` keys are of other tasks.
#[derive(Debug, Deserialize, Serialize)]
struct Config {
    #[serde(flatten)]
    bert: bert::Config,
    embedding_size: usize,
}

impl Default for Config {
    fn default() -> Self {
        let bert = bert::Config {
            hidden_size: 256,
            num_attention_heads: 4,
            intermediate_size: 1024,
            ..bert::Config::default()
        };
        Self { bert, embedding_size: 128 }
    }
}

impl Config {
    fn parse(config: &crate::Config) -> Result<Self> {
        let config: Self = parse(config)?;
        config.bert.check()?;
        sizes(&[("embedding_size", config.embedding_size)])?;
        Ok(config)
    }
}

struct Electra {
    embeddings: Embeddings,
    embeddings_project: Option<Linear>, // where the widths differ
    encoder: Encoder,
    dense: Linear,
    out_proj: Linear,
    dropout: [Dropout; 2],
}

impl Electra {
    fn new(Config { bert, embedding_size }: &Config, num_labels: usize, b: &Builder) -> Result<Self> {
        let (electra, size, init) = (b.scope("electra"), bert.hidden_size, bert.init());
        let (embeddings, project) =
            (electra.scope("embeddings").depth(0), electra.scope("embeddings_project").depth(0));
        let top = bert.num_hidden_layers + 1;
        Ok(Self {
            embeddings: Embeddings::new(bert, *embedding_size, &embeddings)?,
            embeddings_project: match *embedding_size == size {
                true => None,
                false => Some(Linear::new(*embedding_size, size, init, &project)?),
            },
            encoder: Encoder::new(&bert.encoder(), &LAYER_NAMES, &electra.scope("encoder"))?,
            dense: Linear::new(size, size, init, &b.scope("classifier.dense").depth(top))?,
            out_proj: Linear::new(size, num_labels, init, &b.scope("classifier.out_proj").depth(top).head())?,
            dropout: [(); 2].map(|()| b.dropout(bert.classifier_dropout())),
        })
    }
}

impl Model for Electra {
    fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let sequences = &inputs.sequences;
        let mut x = self.embeddings.forward(inputs)?; // [tokens, embedding_size]
        if let Some(project) = &self.embeddings_project {
            x = project.forward(&x)?; // [tokens, hidden_size]
        }
        let first = self.encoder.first_tokens(x, inputs)?; // [sequences, hidden_size]
        let x = gelu(&self.dense.forward(&self.dropout[0].forward(&first, sequences)?)?)?;
        self.out_proj.forward(&self.dropout[1].forward(&x, sequences)?) // [sequences, num_labels]
    }
}
