//! `kiln models`: the architectures that kiln trains.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;

use super::{print, print_json};
use crate::cli::Options;

/// Lists them, with their inputs.
///
/// # Errors
/// stdout cannot be written.
pub fn run(options: &Options) -> Result<ExitCode> {
    let all = kiln_models::ARCHITECTURES;
    if options.json {
        let row = |a: &&kiln_models::Architecture| json!({ "model_type": a.model_type, "class_name": a.class_name, "inputs": a.inputs });
        print_json(&all.iter().map(row).collect::<Vec<_>>())?;
    } else {
        for a in all {
            print(&format!("{:<12} {:<40} {}", a.model_type, a.class_name, a.inputs.join(", ")))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
