//! Plain candle on the step that kiln and PyTorch are timed on: fp32, its autograd, candle_nn's AdamW.
//!
//! The forward is that of candle-transformers' BERT, with a pooler and a classifier. It is written out here because
//! candle-transformers' own cannot be trained: candle_nn's LayerNorm has no backward, and gradients end at it without
//! an error. `layer_norm_slow`, the same in plain ops, has one. Dropout is left out, as candle-transformers leaves it.

#[path = "../support.rs"]
mod support;

use std::env;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{AdamW, Embedding, LayerNorm, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use candle_nn::{embedding, layer_norm, linear, loss::cross_entropy, ops};
use candle_transformers::models::bert::Config;
use clap::Parser;
use serde_json::json;
use support::{Common, timed};

/// Times steps of plain candle and prints a line of JSON
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Rows in the batch
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of each row
    #[arg(long, default_value_t = 128)]
    length: usize,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
    heads: usize,
}

impl Layer {
    fn new(config: &Config, vb: VarBuilder<'_>) -> candle_core::Result<Self> {
        let (size, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let attention = vb.pp("attention");
        Ok(Self {
            query: linear(size, size, attention.pp("self.query"))?,
            key: linear(size, size, attention.pp("self.key"))?,
            value: linear(size, size, attention.pp("self.value"))?,
            attention_output: linear(size, size, attention.pp("output.dense"))?,
            attention_norm: layer_norm(size, eps, attention.pp("output.LayerNorm"))?,
            intermediate: linear(size, inner, vb.pp("intermediate.dense"))?,
            output: linear(inner, size, vb.pp("output.dense"))?,
            output_norm: layer_norm(size, eps, vb.pp("output.LayerNorm"))?,
            heads: config.num_attention_heads,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, length, size) = x.dims3()?;
        let heads = |x: Tensor| x.reshape((batch, length, self.heads, ()))?.transpose(1, 2)?.contiguous();
        let (q, k, v) = (self.query.forward(x)?, self.key.forward(x)?, self.value.forward(x)?);
        let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?); // [batch, heads, length, head_dim]
        let scores = (q.matmul(&k.t()?)? / ((size / self.heads) as f64).sqrt())?;
        let context = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        let context = context.transpose(1, 2)?.contiguous()?.flatten_from(D::Minus2)?; // [batch, length, size]
        let x = norm(&(self.attention_output.forward(&context)? + x)?, &self.attention_norm)?;
        let inner = self.intermediate.forward(&x)?.gelu_erf()?;
        norm(&(self.output.forward(&inner)? + &x)?, &self.output_norm)
    }
}

struct Classifier {
    word: Embedding,
    position: Embedding,
    token_type: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
    pooler: Linear,
    classifier: Linear,
}

impl Classifier {
    fn new(config: &Config, labels: usize, vb: &VarBuilder<'_>) -> candle_core::Result<Self> {
        let (size, embeddings) = (config.hidden_size, vb.pp("bert.embeddings"));
        let layer = |i| Layer::new(config, vb.pp(format!("bert.encoder.layer.{i}")));
        Ok(Self {
            word: embedding(config.vocab_size, size, embeddings.pp("word_embeddings"))?,
            position: embedding(config.max_position_embeddings, size, embeddings.pp("position_embeddings"))?,
            token_type: embedding(config.type_vocab_size, size, embeddings.pp("token_type_embeddings"))?,
            norm: layer_norm(size, config.layer_norm_eps, embeddings.pp("LayerNorm"))?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_, _>>()?,
            pooler: linear(size, size, vb.pp("bert.pooler.dense"))?,
            classifier: linear(size, labels, vb.pp("classifier"))?,
        })
    }

    fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let positions = Tensor::arange(0, ids.dim(1)? as u32, ids.device())?;
        let x = (self.word.forward(ids)? + self.token_type.forward(&ids.zeros_like()?)?)?;
        let x = norm(&x.broadcast_add(&self.position.forward(&positions)?)?, &self.norm)?;
        let x = self.layers.iter().try_fold(x, |x, layer| layer.forward(&x))?; // [batch, length, size]
        let first = x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        self.classifier.forward(&self.pooler.forward(&first)?.tanh()?)
    }
}

fn norm(x: &Tensor, norm: &LayerNorm) -> candle_core::Result<Tensor> {
    let beta = norm.bias().ok_or_else(|| candle_core::Error::Msg("the norm has no bias".into()))?;
    ops::layer_norm_slow(x, norm.weight(), beta, norm.eps() as f32)
}

/// As torch.nn.utils.clip_grad_norm_ has it; every parameter has to have a gradient.
fn clip(grads: &mut GradStore, vars: &[(String, Var)], max_norm: f64) -> Result<()> {
    let mut squares = 0.0;
    for (name, var) in vars {
        let grad = grads.get(var).with_context(|| format!("no gradient came to {name}"))?;
        squares += f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let norm = squares.sqrt();
    for (_, var) in vars.iter().filter(|_| norm > max_norm) {
        if let Some(grad) = grads.remove(var) {
            grads.insert(var, (grad * (max_norm / (norm + 1e-6)))?);
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let Options { common, batch, length } = Options::parse();
    // SAFETY: no other thread runs yet. candle takes its number of threads from here alone.
    unsafe { env::set_var("RAYON_NUM_THREADS", common.threads.to_string()) };
    let (model, device) = (common.model()?, Device::Cpu);
    let json = std::fs::read(model.join("config.json"))?;
    let config: Config = serde_json::from_slice(&json)?;
    let labels = serde_json::from_slice::<serde_json::Value>(&json)?["id2label"].as_object().map_or(2, |ids| ids.len());
    let mut varmap = VarMap::new();
    let classifier = Classifier::new(&config, labels, &VarBuilder::from_varmap(&varmap, DType::F32, &device))?;
    varmap.load(model.join("model.safetensors"))?;

    let vars: Vec<(String, Var)> = {
        let vars = varmap.data().lock().map_err(|e| anyhow::anyhow!("{e}"))?;
        vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    };
    let (decayed, others): (Vec<_>, Vec<_>) =
        vars.iter().cloned().partition(|(name, _)| !name.ends_with(".bias") && !name.contains("LayerNorm"));
    let optimizer = |vars: Vec<(String, Var)>, weight_decay| {
        let params = ParamsAdamW { lr: 5e-5, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay };
        AdamW::new(vars.into_iter().map(|(_, var)| var).collect(), params)
    };
    let mut optimizers = [optimizer(decayed, 0.01)?, optimizer(others, 0.0)?];

    let id = |i: usize, j: usize| match j {
        0 => 101,
        _ if j == length - 1 => 102,
        _ => (1000 + (i * 7919 + j * 104_729) % 28_000) as u32,
    };
    let ids: Vec<u32> = (0..batch).flat_map(|i| (0..length).map(move |j| id(i, j))).collect();
    let targets: Vec<u32> = (0..batch as u32).map(|i| i % 5).collect();
    let (mut seconds, mut parts, mut losses) = (Vec::new(), [const { Vec::new() }; 4], Vec::new());
    for step in 0..common.warmup + common.steps {
        let inputs = || Ok((Tensor::from_slice(&ids, (batch, length), &device)?, Tensor::new(&*targets, &device)?));
        let ((ids, targets), data) = timed(inputs)?;
        let (loss, forward) = timed(|| Ok(cross_entropy(&classifier.forward(&ids)?, &targets)?))?;
        let (mut grads, backward) = timed(|| Ok(loss.backward()?))?;
        let (loss, optimizer) = timed(|| {
            clip(&mut grads, &vars, 1.0)?;
            for optimizer in &mut optimizers {
                optimizer.step(&grads)?;
            }
            drop(grads);
            Ok(loss.to_scalar::<f32>()?)
        })?;
        losses.push(loss);
        if step >= common.warmup {
            let took = [data, forward, backward, optimizer];
            seconds.push(took.iter().sum());
            parts.iter_mut().zip(took).for_each(|(part, took)| part.push(took));
        }
    }

    let [data, forward, backward, optimizer] = parts.map(median);
    let (steps, total) = (common.steps as f64, seconds.iter().sum::<f64>());
    let figures = json!({
        "loss": losses.first(), "second_loss": losses.get(1),
        "tokens_per_second": (batch * length) as f64 * steps / total,
        "examples_per_second": batch as f64 * steps / total,
        "data": data, "forward": forward, "backward": backward, "optimizer": optimizer,
    });
    let notes = ["plain ops", "no dropout", "no mask", "gemm as candle builds it"];
    common.print("candle", &seconds, figures, &["candle-core", "candle-nn", "gemm"], &notes)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = |i: usize| values.get(i).copied();
    Some((middle(values.len() / 2)? + middle(values.len().saturating_sub(1) / 2)?) / 2.0)
}
