//! One verb a file: parse, call, print.

pub mod bench;
pub mod check;
pub mod compare;
pub mod completions;
pub mod export;
pub mod infer;
pub mod man;
pub mod models;
pub mod prepare;
pub mod ranks;
pub mod report;
pub mod repro;
pub mod runs;
pub mod sample;
pub mod train;

use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::cli::{Cli, Command};
use crate::error;
use crate::infer::runtime;

/// What `--json` makes of a command's results.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// One value of them all.
    Value,
    /// A line of each, as it comes.
    Lines,
}

/// Does what the command line says.
///
/// # Errors
/// The command's; [`exit_code`](crate::error::exit_code) says whose fault one is.
pub fn run(cli: &Cli) -> Result<ExitCode> {
    let options = &cli.options;
    if options.quiet {
        error::be_quiet();
    }
    if let Some(cache) = runtime::cache() {
        kiln_kernels::set_kernel_cache(cache.join("kernels"));
    }
    match &cli.command {
        Command::Train(args) => train::run(args, options),
        Command::Prepare(args) => prepare::run(args, options),
        Command::Export(args) => export::run(args, options),
        Command::Infer(args) => infer::run(args, options),
        Command::Repro(args) => repro::run(args, options),
        Command::Bench(args) => bench::run(args, options),
        Command::Compare(args) => compare::run(args, options),
        Command::Report(args) => report::run(args, options),
        Command::Runs(args) => runs::run(args, options),
        Command::Check(args) => check::run(args, options),
        Command::Models => models::run(options),
        Command::Sample(args) => sample::run(args, options),
        Command::Completions { shell } => completions::run(*shell, options),
        Command::Man(args) => man::run(args, options),
    }
}

/// Prints a line to stdout. That nobody reads it any more, as in `kiln … | head`, is no error.
///
/// # Errors
/// stdout cannot be written.
pub fn print(line: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Prints what has happened to stdout as one line of JSON: `{"event": …, "model": …, …}`.
///
/// # Errors
/// As [`print()`].
pub fn print_event(event: &str, model: Option<&str>, value: &impl Serialize) -> Result<()> {
    #[derive(Serialize)]
    struct Line<'a, T> {
        event: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        model: Option<&'a str>,
        #[serde(flatten)]
        value: &'a T,
    }
    print(&serde_json::to_string(&Line { event, model, value })?)
}

/// Prints a value to stdout as indented JSON.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}
