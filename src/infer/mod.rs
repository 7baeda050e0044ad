//! Running exported models with ONNX Runtime, on CPU.

pub mod predictor;
pub mod runtime;
