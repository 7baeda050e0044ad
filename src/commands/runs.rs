//! `kiln runs`: what runs there are.

use std::cmp::Reverse;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use super::{print, print_json};
use crate::cli::{self, Options};
use crate::report::{Summary, runs_table};
use crate::store::{self, Experiment};
use crate::user_error;

/// Lists the runs of all experiments, or of one, the newest first. A run whose files are broken is in the
/// list, with what is wrong.
///
/// # Errors
/// The user's, where there is no such folder or experiment, or no run in it.
pub fn run(args: &cli::Runs, options: &Options) -> Result<ExitCode> {
    let (experiments, place) = chosen(args.place.as_deref(), &options.root())?;
    let runs = experiments.iter().flat_map(|experiment| experiment.run_nums().into_iter().map(|n| experiment.run(n)));
    let mut runs: Vec<(u32, Summary)> = runs.map(|run| (run.run_num(), Summary::of(&run))).collect();
    // One whose start is not known comes last.
    runs.sort_by_key(|(run_num, summary)| Reverse((summary.start, *run_num)));
    let runs: Vec<Summary> = runs.into_iter().map(|(_, summary)| summary).collect();
    if options.json {
        print_json(&runs)?;
    } else if runs.is_empty() {
        return Err(user_error!("no run under {place}: `kiln train` makes one, --root names another folder"));
    } else {
        print(&runs_table(&runs))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The experiments that `place` means, and how to name them: an experiment under `root`, else a folder of
/// experiments; without it, all under `root`.
fn chosen(place: Option<&str>, root: &Path) -> Result<(Vec<Experiment>, String)> {
    let Some(place) = place else { return Ok((store::experiments(root)?, root.display().to_string())) };
    let known = store::experiments(root)?;
    if let Some(experiment) = known.iter().find(|experiment| experiment.name() == place) {
        return Ok((vec![experiment.clone()], experiment.dir().display().to_string()));
    }
    if Path::new(place).is_dir() {
        return Ok((store::experiments(Path::new(place))?, place.into()));
    }
    let names: Vec<&str> = known.iter().map(Experiment::name).collect();
    let names = if names.is_empty() { "there is none".into() } else { format!("there are {}", names.join(", ")) };
    Err(user_error!("{place:?} is neither a folder nor an experiment under {}; {names}", root.display()))
}
