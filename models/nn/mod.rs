//! The parts that models are made of: a closed set of ops, one a file, over a [`Tensor`] that is
//! computed now, a node of the graph being captured, or planned.
//!
//! | file | what |
//! |---|---|
//! | `tensor` | [`Tensor`]: a [`Value`] (a candle tensor and its place on the tape) or a [`Symbol`] |
//! | `op` | [`Op`] and `apply`, the only place where they part ways |
//! | `tape` | what was done, and backward through it |
//! | `recompute` | layers that backward does again instead of keeping them |
//! | `trace` | where the time goes, for whoever asks |
//! | `plan` | [`plan()`]: memory and arithmetic of a batch, before it is computed |
//! | `parameters` | [`Parameters`]: flat values and gradients; [`Builder`] declares them |
//! | `inputs` | [`Inputs`] and [`Sequences`]: packed batches, or `[batch, sequence]` under capture |
//! | `encoder` | [`Encoder`]: the layers that BERT and its kin share |
//! | `graph` | [`Graph`]: standard-opset nodes that export writes |

mod attention;
mod dropout;
mod embedding;
mod encoder;
mod gelu;
mod graph;
mod inputs;
mod layer_norm;
mod linear;
#[cfg(all(test, feature = "cuda"))]
mod on_cuda;
mod op;
mod parameters;
mod plan;
mod pooling;
mod recompute;
mod relu;
mod tanh;
mod tape;
mod tensor;
pub mod trace;

pub use attention::Attention;
pub use dropout::Dropout;
pub use embedding::{Embedding, embed};
pub use encoder::{Encoder, EncoderConfig, LayerNames};
pub use gelu::gelu;
pub use graph::{Attribute, ElementType, Graph, Initializer, InitializerData, Input, Node, Output, capture};
pub use inputs::{Ids, Inputs, Mode, Sequences};
pub use kiln_kernels::Packing;
pub use layer_norm::LayerNorm;
pub use linear::Linear;
pub use op::Op;
pub use parameters::{Builder, Init, LoadReport, NamedTensor, Parameter, Parameters};
pub use plan::{Cost, Place, Plan, Planned, plan};
pub use pooling::first_token;
pub use recompute::recompute;
pub use relu::relu;
pub use tanh::tanh;
pub use tape::{Gradients, Tape};
pub use tensor::{Dim, Shape, Symbol, Tensor, Value};

/// The data of a value: a contiguous candle tensor, f32 or on a GPU bf16.
pub type Data = candle_core::Tensor;
