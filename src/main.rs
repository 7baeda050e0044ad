//! The program: parse, dispatch, say what went wrong.

use std::process::ExitCode;

use clap::Parser as _;
use kiln::cli::Cli;
use kiln::{commands, error};

// Training allocates and frees the same large buffers at each step: glibc maps and unmaps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    commands::run(&cli).unwrap_or_else(|failure| {
        error::say(format_args!("error: {failure}"));
        for cause in failure.chain().skip(1) {
            error::say(format_args!("  caused by: {cause}"));
        }
        error::exit_code(&failure)
    })
}
