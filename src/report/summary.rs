//! What a run comes to in a few figures.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::Comparison;
use crate::config::{Goal, Metric, Objective};
use crate::metrics::Statistics;
use crate::store::{self, JobType, RunDir, Status};

/// A run in a few figures, from its files. Where one is broken, `problem` says so and the rest is what the
/// others say.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// `experiment/run_num`
    pub run: String,
    /// Its folder.
    pub path: PathBuf,
    /// What it is.
    pub job_type: Option<JobType>,
    /// How far it is.
    pub status: Option<Status>,
    /// When it was started, in seconds since 1970.
    pub start: Option<u64>,
    /// How long its models were trained, where each of them says so.
    pub training_seconds: Option<f64>,
    /// Its models.
    pub models: Vec<String>,
    /// The best of them, where one is trained.
    pub best: Option<Best>,
    /// What is wrong with its files.
    pub problem: Option<String>,
}

/// The best model of a run, chosen on validation, never on test.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Best {
    /// Its name.
    pub model: String,
    /// What it is the best by.
    pub metric: Metric,
    /// That figure on the validation part, at the best checkpoint.
    pub validation: f64,
    /// On the test part, where it is tested.
    pub test: Option<Test>,
}

/// Figures on the test part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Test {
    /// Mean of the labels' F1.
    pub macro_f1: f64,
    /// The share of right predictions.
    pub accuracy: f64,
}

impl Summary {
    /// Reads what there is of a run.
    pub fn of(run: &RunDir) -> Self {
        let mut summary = Self {
            run: run.reference(),
            path: run.dir(),
            job_type: None,
            status: None,
            start: None,
            training_seconds: None,
            models: Vec::new(),
            best: None,
            problem: None,
        };
        summary.problem = summary.read(run).err().map(|error| format!("{error:#}"));
        summary
    }

    fn read(&mut self, run: &RunDir) -> Result<()> {
        let record = run.record()?;
        (self.job_type, self.status) = (Some(record.job_type), Some(record.status));
        (self.start, self.models) = (Some(record.start), record.models);
        if record.job_type == JobType::Comparison {
            let comparison: Comparison = store::read_json(&run.comparison_json())?;
            let model = comparison.models.iter().find(|(name, _)| *name == comparison.best);
            self.best = model.map(|(name, model)| Best {
                model: name.clone(),
                metric: comparison.objective.metric,
                validation: model.validation,
                test: Some(Test::of(&model.statistics)),
            });
            return Ok(());
        }
        let objective = objective(run)?;
        let mut seconds = Some(0.0);
        for name in &self.models {
            let files = run.model(name);
            let Some(validation) = read_if_there::<Statistics>(&files.statistics_json())? else {
                seconds = None;
                continue;
            };
            seconds = seconds.zip(validation.training_seconds).map(|(sum, more)| sum + more);
            let figure = validation.get(objective.metric);
            let better = |best: &Best| match objective.goal {
                Goal::Max => figure > best.validation,
                Goal::Min => figure < best.validation,
            };
            if self.best.as_ref().is_none_or(better) {
                let test: Option<Statistics> = read_if_there(&files.test().join("statistics.json"))?;
                let test = test.as_ref().map(Test::of);
                self.best = Some(Best { model: name.clone(), metric: objective.metric, validation: figure, test });
            }
        }
        self.training_seconds = seconds.filter(|&seconds| seconds > 0.0);
        Ok(())
    }
}

impl Test {
    fn of(statistics: &Statistics) -> Self {
        Self { macro_f1: statistics.macro_f1, accuracy: statistics.accuracy }
    }
}

/// What a run's best is chosen by. Of lock.json nothing else is read: the rest may be of another kiln.
fn objective(run: &RunDir) -> Result<Objective> {
    #[derive(Deserialize)]
    struct Locked {
        config: Decided,
    }
    #[derive(Deserialize)]
    struct Decided {
        objective: Objective,
    }
    Ok(store::read_json::<Locked>(&run.lock_json())?.config.objective)
}

fn read_if_there<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.exists() { store::read_json(path).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::statistics;
    use crate::store::{Experiment, write_bytes, write_json};
    use serde_json::json;

    #[test]
    fn the_best_is_chosen_on_validation_among_what_is_trained() {
        let dir = tempfile::tempdir().unwrap();
        let run = Experiment::new(dir.path(), "x").run(3);
        let labels = ["no", "yes"].map(String::from);
        let record = json!({
            "job_type": "training", "experiment": "x", "run_num": 3, "models": ["a", "b", "c"], "snapshot": "s",
            "status": "stopped", "start": 1_000_000
        });
        write_json(&run.dir().join("run.json"), &record).unwrap();
        let lock = json!({ "config": { "objective": { "metric": "loss", "goal": "min" } } });
        write_json(&run.lock_json(), &lock).unwrap();
        for (name, loss) in [("a", 0.5), ("b", 0.25)] {
            let of = |predicted: &[u32]| statistics(&labels, &[0, 1], predicted, Some(loss));
            write_json(&run.model(name).statistics_json(), &of(&[0, 1])).unwrap();
            write_json(&run.model(name).test().join("statistics.json"), &of(&[0, 0])).unwrap();
        }
        let summary = Summary::of(&run);
        let best = summary.best.unwrap();
        assert_eq!((best.model.as_str(), best.validation, best.test.unwrap().accuracy), ("b", 0.25, 0.5));
        assert_eq!((summary.problem, summary.training_seconds, summary.start), (None, None, Some(1_000_000)));

        write_bytes(&run.model("b").statistics_json(), b"{").unwrap();
        let summary = Summary::of(&run);
        assert!(summary.problem.unwrap().contains("b/statistics.json does not hold what it should"));
        assert_eq!((summary.run.as_str(), summary.best.unwrap().model.as_str()), ("x/3", "a"));
        let nothing = Summary::of(&Experiment::new(dir.path(), "x").run(9));
        assert!(nothing.problem.unwrap().contains("9/run.json"));
    }
}
