//! `kiln models`: the architectures that kiln trains.

use std::process::ExitCode;

use anyhow::Result;
use kiln_models::{ARCHITECTURES, Architecture};
use serde_json::{Value, json};

use super::{print, print_json};
use crate::cli::Options;

/// Lists them, with what each supports.
///
/// # Errors
/// stdout cannot be written.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.json {
        print_json(&ARCHITECTURES.iter().map(|a| row(a)).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&format!("{:<12} {:<35} {:<15} inputs", "model_type", "class", "from scratch"))?;
    for a in ARCHITECTURES {
        print(&format!(
            "{:<12} {:<35} {:<15} {}",
            a.model_type,
            a.class_name,
            a.tokenizer.name(),
            a.inputs.join(", ")
        ))?;
    }
    print(
        "\nEach reads a folder with its model_type in config.json, or starts from scratch with a new tokenizer of its \
         kind; classifies texts and pairs of texts; trains on CPU and CUDA; and exports to ONNX with a certificate.",
    )?;
    Ok(ExitCode::SUCCESS)
}

/// What holds of all of them does so by their ops, each of which computes on both devices and exports.
fn row(a: &Architecture) -> Value {
    json!({
        "model_type": a.model_type,
        "class_name": a.class_name,
        "inputs": a.inputs,
        "text_pair": true,
        "from_scratch": { "tokenizer": a.tokenizer.name(), "tokenizer_class": a.tokenizer_class },
        "onnx": true,
        "devices": ["cpu", "cuda"],
    })
}
