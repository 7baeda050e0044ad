//! `kiln completions`: what a shell needs to complete kiln's command line.

use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory as _;
use clap_complete::{Shell, generate};

use super::print;
use crate::cli::{Cli, Options};
use crate::user_error;

/// Prints the script.
///
/// # Errors
/// The user's, who asks for it as JSON; stdout cannot be written.
pub fn run(shell: Shell, options: &Options) -> Result<ExitCode> {
    if options.json {
        return Err(user_error!("kiln completions prints a script for {shell}, which is no JSON: leave --json out"));
    }
    let mut script = Vec::new();
    generate(shell, &mut Cli::command(), "kiln", &mut script);
    print(String::from_utf8(script)?.trim_end())?;
    Ok(ExitCode::SUCCESS)
}
