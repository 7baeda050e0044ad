//! Trained model → ONNX file, with a certificate that both say the same.

pub mod onnx;
pub mod proto;
