//! `kiln sample`: the embedded sample's documents on the disk.

use std::process::ExitCode;

use anyhow::Result;

use super::print;
use crate::cli::{Options, Sample};
use crate::data::sample;

/// Writes them.
///
/// # Errors
/// The user's, of the path; the file cannot be written.
pub fn run(args: &Sample, options: &Options) -> Result<ExitCode> {
    sample::write(&args.output, args.seed, args.count)?;
    if !options.quiet {
        print(&args.output.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}
