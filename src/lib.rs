//! kiln fine-tunes transformer classifiers in pure Rust.
#![warn(missing_docs)]

pub mod cli;
pub mod commands;
pub mod config;
pub mod data;
pub mod error;
pub mod export;
pub mod infer;
pub mod metrics;
pub mod pretrained;
pub mod progress;
pub mod report;
pub mod store;
pub mod track;
pub mod train;
