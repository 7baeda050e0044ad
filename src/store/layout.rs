//! The run tree: which path is what.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use super::{Pins, read_json};
use crate::error::UserError;
use crate::user_error;

/// An experiment's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experiment {
    root: PathBuf,
    name: String,
}

/// A run's folder: paths, and what its files say. [`Run`](super::Run) is one that this process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir {
    experiment: Experiment,
    run_num: u32,
}

/// run.json.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// What the run is.
    pub job_type: JobType,
    /// The experiment.
    pub experiment: String,
    /// Which of its runs.
    pub run_num: u32,
    /// The models' names, in the configuration's order; of a comparison, as comparison.json has them.
    pub models: Vec<String>,
    /// The data's snapshot.
    pub snapshot: String,
    /// The snapshot's folder, where it lies elsewhere than in the experiment's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_dir: Option<PathBuf>,
    /// How far it is.
    pub status: Status,
    /// [`Config::hash`](crate::config::Config::hash); a comparison has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub config_hash: String,
    /// When it was started, in seconds since 1970.
    pub start: u64,
}

/// What a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobType {
    /// Models are trained.
    Training,
    /// Runs are compared.
    Comparison,
    /// Parameters are searched.
    Tuning,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It runs, or its process was killed.
    Training,
    /// It is complete.
    Finished,
    /// It ended after the stage it was asked to end after.
    Stopped,
    /// A signal ended it, with a checkpoint written.
    Interrupted,
    /// An error ended it.
    Failed,
}

impl JobType {
    /// As run.json has it.
    pub fn name(self) -> &'static str {
        match self {
            JobType::Training => "training",
            JobType::Comparison => "comparison",
            JobType::Tuning => "tuning",
        }
    }
}

impl Status {
    /// As run.json has it.
    pub fn name(self) -> &'static str {
        match self {
            Status::Training => "training",
            Status::Finished => "finished",
            Status::Stopped => "stopped",
            Status::Interrupted => "interrupted",
            Status::Failed => "failed",
        }
    }
}

/// A model's folder in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelDir {
    dir: PathBuf,
}

impl Experiment {
    /// The experiment `name` under `root`; touches no file.
    pub fn new(root: &Path, name: &str) -> Self {
        Self { root: root.to_owned(), name: name.to_owned() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `<root>/<experiment>`
    pub fn dir(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    /// `<root>/<experiment>/data`: the snapshots.
    pub fn data_dir(&self) -> PathBuf {
        self.dir().join("data")
    }

    /// `<root>/<experiment>/runs`
    pub fn runs(&self) -> PathBuf {
        self.dir().join("runs")
    }

    /// `<root>/<experiment>/runs/<run_num>`, whether it is there or not.
    pub fn run(&self, run_num: u32) -> RunDir {
        RunDir { experiment: self.clone(), run_num }
    }

    /// The numbers of its runs, ascending.
    pub fn run_nums(&self) -> Vec<u32> {
        let mut numbers: Vec<u32> = names(&self.runs()).filter_map(|name| name.parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    }

    /// The number that its next run gets.
    pub(super) fn next_run_num(&self) -> Result<u32> {
        let highest = self.run_nums().last().copied().unwrap_or(0);
        highest.checked_add(1).ok_or_else(|| {
            user_error!(
                "{} has a run {highest}, and no number is higher: take that folder away, or set run_num",
                self.runs().display()
            )
        })
    }
}

impl RunDir {
    /// The run's folder.
    pub fn dir(&self) -> PathBuf {
        self.experiment.runs().join(self.run_num.to_string())
    }

    /// The experiment it belongs to.
    pub fn experiment(&self) -> &Experiment {
        &self.experiment
    }

    /// Which of the experiment's runs it is.
    pub fn run_num(&self) -> u32 {
        self.run_num
    }

    /// How messages name it: `experiment/run_num`.
    pub fn reference(&self) -> String {
        format!("{}/{}", self.experiment.name, self.run_num)
    }

    /// Reads run.json.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn record(&self) -> Result<RunRecord> {
        read_json(&self.record_path())
    }

    /// Reads lock.json, the resolved configuration in it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn pins(&self) -> Result<Pins> {
        read_json(&self.lock_json())
    }

    /// The folder of one of its models, whether it is there or not.
    pub fn model(&self, name: &str) -> ModelDir {
        ModelDir { dir: self.dir().join(name) }
    }

    /// How its models compare, where they were, or what a comparison of other runs found.
    pub fn comparison_json(&self) -> PathBuf {
        self.dir().join("comparison.json")
    }

    /// The folder of its data's snapshot.
    ///
    /// # Errors
    /// run.json cannot be read.
    pub fn snapshot_dir(&self) -> Result<PathBuf> {
        let record = self.record()?;
        Ok(record.snapshot_dir.unwrap_or_else(|| self.experiment.data_dir().join(record.snapshot)))
    }

    /// The run as a page: everything there is to see of it.
    pub fn report_html(&self) -> PathBuf {
        self.dir().join("report.html")
    }

    /// What decides what its models are: [`Pins`]; a comparison has none.
    pub fn lock_json(&self) -> PathBuf {
        self.dir().join("lock.json")
    }

    /// The experiment file that it was started with.
    pub fn experiment_toml(&self) -> PathBuf {
        self.dir().join("experiment.toml")
    }

    pub(super) fn record_path(&self) -> PathBuf {
        self.dir().join("run.json")
    }
}

impl ModelDir {
    /// The model's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Checkpoints to resume from, a folder for each step.
    pub fn checkpoints(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }

    /// The best weights, as transformers loads them.
    pub fn model(&self) -> PathBuf {
        self.dir.join("model")
    }

    /// The temperature that its probabilities are calibrated by.
    pub fn calibration_json(&self) -> PathBuf {
        self.model().join("calibration.json")
    }

    /// The exported model.
    pub fn onnx(&self) -> PathBuf {
        self.dir.join("model.onnx")
    }

    /// The export's certificate.
    pub fn export_json(&self) -> PathBuf {
        self.dir.join("export.json")
    }

    /// The exported model on 8-bit integers.
    pub fn onnx_int8(&self) -> PathBuf {
        self.dir.join("model.int8.onnx")
    }

    /// Its certificate.
    pub fn export_int8_json(&self) -> PathBuf {
        self.dir.join("export.int8.json")
    }

    /// Where the time of some steps went, as `kiln train --profile` writes it.
    pub fn trace_json(&self) -> PathBuf {
        self.dir.join("trace.json")
    }

    /// What happened at each step and evaluation.
    pub fn metrics_jsonl(&self) -> PathBuf {
        self.dir.join("metrics.jsonl")
    }

    /// Validation at the best checkpoint.
    pub fn statistics_json(&self) -> PathBuf {
        self.dir.join("statistics.json")
    }

    /// Losses, learning rate and scores over the steps.
    pub fn curves_png(&self) -> PathBuf {
        self.dir.join("curves.png")
    }

    /// What the exported model makes of the test part: statistics.json, predictions.parquet, …
    pub fn test(&self) -> PathBuf {
        self.dir.join("test")
    }
}

/// The experiments under `root`, by name: the folders that have runs. Where there is no `root`, there is none.
///
/// # Errors
/// The user's, where `root` cannot be read.
pub fn experiments(root: &Path) -> Result<Vec<Experiment>> {
    match fs::read_dir(root) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(UserError(anyhow!(error).context(format!("cannot read {}", root.display()))).into())
        }
        _ => Ok(names(root).map(|name| Experiment::new(root, &name)).filter(|e| e.runs().is_dir()).collect()),
    }
}

/// The run that `reference` names: a run's folder, `experiment/run_num` under `root`, an
/// experiment for its newest run with models, or nothing for the newest such of all.
///
/// # Errors
/// There is no such run.
pub fn find(reference: Option<&str>, root: &Path) -> Result<RunDir> {
    let Some(reference) = reference else {
        let runs = names(root).flat_map(|name| runs_of(&Experiment::new(root, &name)));
        return newest(runs).ok_or_else(|| {
            user_error!("no run under {}: `kiln train` makes one, --root names another folder", root.display())
        });
    };
    let folder = Path::new(reference);
    if folder.join("run.json").is_file() {
        return from_folder(folder);
    }
    let found = match reference.split_once('/') {
        None => newest(runs_of(&Experiment::new(root, reference))),
        Some((experiment, number)) => number.parse().ok().map(|number| Experiment::new(root, experiment).run(number)),
    };
    found.filter(|run| run.record_path().is_file()).ok_or_else(|| {
        let known: Vec<String> =
            names(root).flat_map(|name| runs_of(&Experiment::new(root, &name))).map(|run| run.reference()).collect();
        let known = if known.is_empty() { "there is none".into() } else { format!("there are {}", known.join(", ")) };
        user_error!(
            "no run {reference:?}: needs a run's folder or experiment/run_num under {}; {known}",
            root.display()
        )
    })
}

/// The `model/` folder of an earlier run's model, `experiment/run_num/model` under `root`.
///
/// # Errors
/// There is no such run, or it has no such model.
pub fn find_model(reference: &str, root: &Path) -> Result<PathBuf> {
    let (run, name) = reference.rsplit_once('/').unwrap_or((reference, ""));
    let folder = find(Some(run), root)?.model(name).model();
    if folder.is_dir() { Ok(folder) } else { Err(user_error!("{reference:?}: {} is not there", folder.display())) }
}

/// A run from its folder, which may be named from within.
fn from_folder(folder: &Path) -> Result<RunDir> {
    let full = fs::canonicalize(folder)
        .map_err(|error| UserError(anyhow!(error).context(format!("cannot open {}", folder.display()))))?;
    // <root>/<experiment>/runs/<run_num>
    let place = (|| {
        let run_num = full.file_name()?.to_str()?.parse().ok()?;
        let runs = full.parent().filter(|runs| runs.ends_with("runs"))?;
        let experiment = runs.parent()?;
        Some(Experiment::new(experiment.parent()?, experiment.file_name()?.to_str()?).run(run_num))
    })();
    place.ok_or_else(|| {
        user_error!("{} is not at its place, <root>/<experiment>/runs/<run_num>: move it there", full.display())
    })
}

fn runs_of(experiment: &Experiment) -> Vec<RunDir> {
    experiment
        .run_nums()
        .into_iter()
        .map(|number| experiment.run(number))
        .filter(|run| run.record_path().is_file())
        .collect()
}

/// The newest that has models of its own.
fn newest(runs: impl IntoIterator<Item = RunDir>) -> Option<RunDir> {
    let start = |run: &RunDir| match run.record() {
        Ok(record) if record.job_type == JobType::Comparison => None,
        record => Some(record.map_or(0, |record| record.start)),
    };
    let runs = runs.into_iter().filter_map(|run| Some((start(&run)?, run)));
    runs.max_by_key(|(start, run)| (*start, run.run_num)).map(|(_, run)| run)
}

/// Names in a folder, sorted; none where there is no folder.
fn names(dir: &Path) -> impl Iterator<Item = String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.into_iter()
}
