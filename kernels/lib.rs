//! Fused forward and backward kernels for training transformers: tensors in, tensors out.
//!
//! Activations and their gradients are contiguous candle [`Tensor`]s: `f32`, on a GPU also `bf16`. Parameters, their
//! gradients and the optimizer's moments lie in flat [`Buffer`]s, and a kernel takes its part of
//! one as a [`View`] or a [`ViewMut`]; a parameter's gradient is always *added* into its view.
//! Sequences lie one after another without padding, and a [`Packing`] says where each one ends.
//!
//! | kernel | |
//! |---|---|
//! | [`linear`] | `y = x·Wᵀ + b` |
//! | [`layer_norm`] | `y = LN(residual + dropout(x))` in one pass |
//! | [`attention`] | softmax attention inside each sequence; probabilities are never kept |
//! | [`gelu`], [`relu`], [`tanh`] | activations |
//! | [`embedding`], [`pooling`] | rows in, rows out |
//! | [`dropout`](mod@dropout) | masks made by a counter, so that none is kept |
//! | [`cross_entropy`] | loss and its gradient in one pass |
//! | [`adamw`], [`norm`] | the optimizer step and the global gradient norm |
//! | [`init`] | reproducible initial weights |
//!
//! Every result has the same bits for any number of [`threads`]. Each kernel's tests hold a plain
//! twin of it in candle's own differentiable ops, and check its gradients by finite differences.
//!
//! Kernels run where their inputs are: on the CPU, or with the feature `cuda` on a GPU that
//! [`cuda_device`] opened. There, activations are `bf16` where parameters keep a copy in it
//! ([`Buffer::keep_bf16`]); sums, norms, softmax, the loss and parameters' gradients are `f32` all the
//! same. An input on another device, of another dtype or not contiguous is an error that says so.
#![warn(missing_docs)]

mod add;
mod buffer;
mod cpu;
mod device;
#[cfg(any(test, feature = "cuda"))]
mod gpu;
mod lending;
mod packing;
mod product;
mod random;
mod simd;
#[cfg(test)]
mod testing;
mod tile;
mod view;

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod gelu;
pub mod init;
pub mod layer_norm;
pub mod linear;
pub mod norm;
pub mod pooling;
pub mod relu;
pub mod tanh;
pub mod threads;

pub use add::add;
pub use buffer::Buffer;
pub use candle_core::{DType, Device, Error, Result, Tensor};
pub use device::{allow_tf32, cuda_device, cuda_devices, cuda_memory, set_kernel_cache};
pub use dropout::Dropout;
#[cfg(feature = "cuda")]
pub use gpu::cuda::OnGpu;
pub use lending::{Lent, OnHost};
pub use linear::Grad;
pub use packing::Packing;
pub use view::{View, ViewMut};
