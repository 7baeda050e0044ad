//! The encoder of BERT and its kin: layers of self-attention and a feed-forward network, each with a norm
//! after its residual (Vaswani et al., 2017).

use std::sync::Arc;

use super::{
    Attention, Builder, Dropout, Init, Inputs, LayerNorm, Linear, Sequences, Tensor, first_token, gelu, recompute,
};
use crate::Result;

/// An encoder's sizes and dropouts.
pub struct EncoderConfig {
    /// How many layers.
    pub layers: usize,
    /// The width of a token.
    pub hidden_size: usize,
    /// Heads of attention, of which `hidden_size` is a multiple.
    pub heads: usize,
    /// The width inside a layer's feed-forward network.
    pub intermediate_size: usize,
    /// The norms' epsilon.
    pub layer_norm_eps: f64,
    /// How weights start.
    pub init: Init,
    /// Dropout on attention's probabilities.
    pub attention_dropout: f32,
    /// Dropout on what attention and the feed-forward network add to the residual.
    pub residual_dropout: [f32; 2],
}

/// Where checkpoints keep a layer's parts, below `layer.N`.
pub struct LayerNames {
    /// Linear: queries.
    pub query: &'static str,
    /// Linear: keys.
    pub key: &'static str,
    /// Linear: values.
    pub value: &'static str,
    /// Linear: what attention gives.
    pub attention_output: &'static str,
    /// The norm after attention.
    pub attention_norm: &'static str,
    /// Linear: into the feed-forward network.
    pub intermediate: &'static str,
    /// Linear: out of it.
    pub output: &'static str,
    /// The norm after it.
    pub output_norm: &'static str,
}

/// A stack of layers, of which a classifier needs the first tokens.
pub struct Encoder {
    layers: Vec<Arc<Layer>>,
}

impl Encoder {
    /// Declares `layer.0`, `layer.1`, …: layer `i` at depth `i + 1`.
    ///
    /// # Errors
    /// None today; layers share the form.
    pub fn new(config: &EncoderConfig, names: &LayerNames, b: &Builder) -> Result<Self> {
        let layer = |i: usize| Layer::new(config, names, &b.scope(&format!("layer.{i}")).depth(i + 1)).map(Arc::new);
        Ok(Self { layers: (0..config.layers).map(layer).collect::<Result<_>>()? })
    }

    /// The embeddings `[tokens, hidden_size]` to each sequence's first token after the last layer,
    /// `[sequences, hidden_size]`. Shows every hidden state.
    ///
    /// # Errors
    /// A width that is not the encoder's.
    pub fn first_tokens(&self, mut x: Tensor, inputs: &Inputs) -> Result<Tensor> {
        let sequences = &inputs.sequences;
        inputs.hidden_state(&x);
        let shows_all = inputs.keeps_hidden_states();
        for (i, layer) in self.layers.iter().enumerate() {
            // Only first tokens are read: unless all are to be shown, the last layer makes no other row.
            let all = shows_all || i + 1 < self.layers.len();
            x = recompute(layer, &x, sequences, if all { Layer::forward } else { Layer::first_tokens })?;
            inputs.hidden_state(&x);
        }
        if shows_all { first_token(&x, sequences) } else { Ok(x) }
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
    fn new(config: &EncoderConfig, names: &LayerNames, b: &Builder) -> Result<Self> {
        let (size, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let linear = |input, output, name| Linear::new(input, output, config.init, &b.scope(name));
        Ok(Self {
            query: linear(size, size, names.query)?,
            key: linear(size, size, names.key)?,
            value: linear(size, size, names.value)?,
            attention: Attention::new(config.heads, size / config.heads, b.dropout(config.attention_dropout)),
            attention_output: linear(size, size, names.attention_output)?,
            attention_norm: LayerNorm::new(size, eps, &b.scope(names.attention_norm))?,
            intermediate: linear(size, inner, names.intermediate)?,
            output: linear(inner, size, names.output)?,
            output_norm: LayerNorm::new(size, eps, &b.scope(names.output_norm))?,
            dropout: config.residual_dropout.map(|probability| b.dropout(probability)),
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
