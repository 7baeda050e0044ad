//! `kiln sample`: the embedded sample's documents on the disk.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;

use super::{print, print_json};
use crate::cli::{Options, Sample};
use crate::data::sample;

/// Writes them.
///
/// # Errors
/// The user's, of the path; the file cannot be written.
pub fn run(args: &Sample, options: &Options) -> Result<ExitCode> {
    sample::write(&args.output, args.seed, args.count)?;
    if options.json {
        print_json(&json!({ "path": args.output, "documents": args.count, "seed": args.seed }))?;
    } else {
        print(&args.output.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}
