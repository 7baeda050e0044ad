//! `kiln report`: a run's page, made again from its files.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;

use super::{print, print_json};
use crate::cli::{self, Options};
use crate::error::say;
use crate::report;
use crate::store::{self, RunDir};

/// Writes a run's report.html, or the same page elsewhere, and prints its path.
///
/// # Errors
/// The user's, where there is no such run; what [`report::write_report`] says.
pub fn run(args: &cli::Report, options: &Options) -> Result<ExitCode> {
    let run = store::find(args.run.as_deref(), &options.root())?;
    let output = args.output.clone().unwrap_or_else(|| run.report_html());
    report::write_report(&run, &output)?;
    if options.json {
        print_json(&json!({ "report": output.display().to_string() }))?;
    } else {
        print(&output.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a run's report.html at the end of its work. That it cannot is said and no more: what it shows
/// stands in the run's files, and `kiln report` makes it from them at any time.
pub(super) fn leave(run: &RunDir, options: &Options) {
    match report::write_report(run, &run.report_html()) {
        Ok(()) if options.quiet => {}
        Ok(()) => say(format_args!("report: {}", run.report_html().display())),
        Err(error) => say(format_args!(
            "warning: the run is complete but for its report: {error:#}; kiln report {} makes it",
            run.dir().display()
        )),
    }
}
