//! `kiln compare`: tested models on the same rows, side by side.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use super::{print, print_json};
use crate::cli::{self, Options};
use crate::config;
use crate::error::say;
use crate::report::{self, Comparison, comparison_table};
use crate::store::{self, JobType, RunDir};
use crate::user_error;

/// Compares the models of one run or of several, or prints again what a comparison found.
///
/// # Errors
/// The user's, where there is no such run or model, or fewer than two; what [`report::compare`] says.
pub fn run(args: &cli::Compare, options: &Options) -> Result<ExitCode> {
    let root = options.root();
    let runs: Vec<RunDir> = match args.runs.as_slice() {
        [] => vec![store::find(None, &root)?],
        names => names.iter().map(|name| store::find(Some(name), &root)).collect::<Result<_>>()?,
    };
    if let ([run], []) = (runs.as_slice(), args.model.as_slice())
        && run.record()?.job_type == JobType::Comparison
    {
        show(&store::read_json(&run.comparison_json())?, &run.comparison_json(), options)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (mut models, mut all) = (Vec::new(), 0);
    for run in &runs {
        let names = run.record()?.models;
        all += names.len();
        models.extend(chosen(run, names, &args.model)?.into_iter().map(|name| (run.clone(), name)));
    }
    if let [(run, model)] = models.as_slice() {
        return Err(user_error!(
            "{} gives one model, {model:?}, and a comparison needs two: name another run beside it",
            run.reference()
        ));
    }
    let whole_run = runs.len() == 1 && models.len() == all;
    let held = if whole_run { runs.first().map(RunDir::hold).transpose()? } else { None };
    let comparison = report::compare(&report::named(models)?)?;
    let run = match (runs.as_slice(), held) {
        ([run, ..], Some(_held)) => {
            store::write_json(&run.comparison_json(), &comparison)?;
            run.clone()
        }
        ([first, ..], None) => {
            let names = comparison.models.iter().map(|(name, _)| name.clone()).collect();
            let dir = first.record()?.snapshot_dir;
            let run = first.experiment().add_comparison(names, &comparison.snapshot, dir, &comparison)?;
            if !options.quiet {
                say(format_args!("run {} in {}", run.reference(), run.dir().display()));
            }
            run
        }
        ([], _) => return Ok(ExitCode::SUCCESS),
    };
    show(&comparison, &run.comparison_json(), options)?;
    super::report::leave(&run, options);
    Ok(ExitCode::SUCCESS)
}

/// The models of `run` that take part: all, or those that were asked for.
fn chosen(run: &RunDir, names: Vec<String>, asked: &[String]) -> Result<Vec<String>> {
    let reference = run.reference();
    if run.record()?.job_type == JobType::Comparison {
        return Err(user_error!("{reference} is a comparison of {}: name the runs themselves", names.join(", ")));
    }
    let taken: Vec<String> = names.iter().filter(|name| asked.is_empty() || asked.contains(name)).cloned().collect();
    if taken.is_empty() {
        let (asked, names) = (asked.join(", "), names.join(", "));
        return Err(user_error!("run {reference} has no model {asked}; it has {names}"));
    }
    Ok(taken)
}

/// Compares all models of a run that this process holds, writes its comparison.json and prints it, as JSON
/// in one line.
///
/// # Errors
/// What [`report::compare`] says; the file cannot be written.
pub(super) fn compare_and_print(run: &RunDir, models: &[config::Model], options: &Options) -> Result<()> {
    let models = models.iter().map(|model| (run.clone(), model.name.clone())).collect();
    let comparison = report::compare(&report::named(models)?)?;
    store::write_json(&run.comparison_json(), &comparison)?;
    match options.json {
        true => super::print_event("comparison", None, &comparison),
        false => show(&comparison, &run.comparison_json(), options),
    }
}

fn show(comparison: &Comparison, file: &Path, options: &Options) -> Result<()> {
    if options.json {
        return print_json(comparison);
    }
    print(&comparison_table(comparison, file))
}
