//! What happens in a training, as typed events.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize};

use crate::metrics::Statistics;
use crate::store::Status;

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A process begins the training, or goes on with it.
    Start(Start),
    /// Some optimizer steps were made.
    Step(Step),
    /// The model was evaluated on the validation part.
    Evaluation(Evaluation),
    /// The exported model was tested on the test part.
    Test(Test),
    /// The run ended.
    End(End),
}

/// What is trained, and where a process takes it up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// Optimizer steps made before.
    pub step: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// The experiment.
    pub experiment: String,
    /// Which of its runs.
    pub run_num: u32,
    /// The model.
    pub model: String,
    /// The resolved configuration, with this model alone.
    pub config: serde_json::Value,
}

/// Where the training stands after some optimizer steps.
///
/// A value that is not finite is `null` in the file and NaN where it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Optimizer steps made so far.
    pub step: u64,
    /// Seconds since 1970; 0 in a file from before it was told.
    #[serde(default)]
    pub time: f64,
    /// Passes over the training part so far.
    #[serde(deserialize_with = "nan_from_null")]
    pub epoch: f64,
    /// Mean loss of the examples since the last such event.
    #[serde(deserialize_with = "nan_from_null")]
    pub train_loss: f64,
    /// Learning rate of the last step.
    #[serde(deserialize_with = "nan_from_null")]
    pub learning_rate: f64,
    /// Global norm of the last step's gradient, before clipping.
    #[serde(deserialize_with = "nan_from_null")]
    pub grad_norm: f64,
    /// Tokens a second since the last such event.
    #[serde(deserialize_with = "nan_from_null")]
    pub tokens_per_second: f64,
}

/// What an evaluation on the validation part found.
///
/// Its `Display` is the line that `kiln train` prints for it. A value that is not finite is `null`
/// in the file and NaN where it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Optimizer steps made so far.
    pub step: u64,
    /// Passes over the training part so far.
    #[serde(deserialize_with = "nan_from_null")]
    pub epoch: f64,
    /// Mean loss of the training examples since the last evaluation.
    #[serde(deserialize_with = "nan_from_null")]
    pub train_loss: f64,
    /// Mean loss of the validation part.
    #[serde(deserialize_with = "nan_from_null")]
    pub validation_loss: f64,
    /// Share of right predictions.
    #[serde(deserialize_with = "nan_from_null")]
    pub validation_accuracy: f64,
    /// Mean of the labels' F1.
    #[serde(deserialize_with = "nan_from_null")]
    pub validation_macro_f1: f64,
    /// F1 over all decisions together.
    #[serde(deserialize_with = "nan_from_null")]
    pub validation_micro_f1: f64,
    /// Mean of the labels' F1, weighted by their rows.
    #[serde(deserialize_with = "nan_from_null")]
    pub validation_weighted_f1: f64,
    /// No earlier evaluation was better by the run's objective.
    pub best: bool,
}

/// What test/statistics.json says of the exported model. A value that is not finite is `null` in the
/// file and NaN where it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Test {
    /// Optimizer steps made in all.
    pub step: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// Mean loss.
    #[serde(deserialize_with = "nan_from_null")]
    pub test_loss: f64,
    /// Share of right predictions.
    #[serde(deserialize_with = "nan_from_null")]
    pub test_accuracy: f64,
    /// Mean of the labels' F1.
    #[serde(deserialize_with = "nan_from_null")]
    pub test_macro_f1: f64,
    /// F1 over all decisions together.
    #[serde(deserialize_with = "nan_from_null")]
    pub test_micro_f1: f64,
    /// Mean of the labels' F1, weighted by their rows.
    #[serde(deserialize_with = "nan_from_null")]
    pub test_weighted_f1: f64,
}

/// How the run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// Optimizer steps made in all.
    pub step: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// As in run.json.
    pub status: Status,
}

impl Test {
    /// The figures of `statistics`, found now, after `step` optimizer steps.
    pub fn new(step: u64, statistics: &Statistics) -> Self {
        Self {
            step,
            time: now(),
            test_loss: statistics.loss.unwrap_or(f64::NAN),
            test_accuracy: statistics.accuracy,
            test_macro_f1: statistics.macro_f1,
            test_micro_f1: statistics.micro_f1,
            test_weighted_f1: statistics.weighted_f1,
        }
    }
}

impl Event {
    /// Optimizer steps made so far.
    pub fn step(&self) -> u64 {
        match self {
            Self::Start(start) => start.step,
            Self::Step(step) => step.step,
            Self::Evaluation(evaluation) => evaluation.step,
            Self::Test(test) => test.step,
            Self::End(end) => end.step,
        }
    }

    /// When it was, in seconds since 1970, where it says so: an evaluation belongs to the step before it.
    pub fn time(&self) -> Option<f64> {
        let time = match self {
            Self::Start(start) => start.time,
            Self::Step(step) => step.time,
            Self::Evaluation(_) => return None,
            Self::Test(test) => test.time,
            Self::End(end) => end.time,
        };
        (time > 0.0).then_some(time)
    }

    /// Whether it is told at a run's end, and told again when a run that had ended goes on.
    pub fn is_ending(&self) -> bool {
        matches!(self, Self::Test(_) | Self::End(_))
    }

    /// Its figures by the names that trackers show them under. One that is not finite is left out.
    pub fn figures(&self) -> Vec<(&'static str, f64)> {
        let mut figures = match self {
            Self::Start(_) | Self::End(_) => Vec::new(),
            Self::Step(step) => vec![
                ("train/epoch", step.epoch),
                ("train/loss", step.train_loss),
                ("train/learning_rate", step.learning_rate),
                ("train/grad_norm", step.grad_norm),
                ("train/tokens_per_second", step.tokens_per_second),
            ],
            Self::Evaluation(evaluation) => vec![
                ("validation/loss", evaluation.validation_loss),
                ("validation/accuracy", evaluation.validation_accuracy),
                ("validation/macro_f1", evaluation.validation_macro_f1),
                ("validation/micro_f1", evaluation.validation_micro_f1),
                ("validation/weighted_f1", evaluation.validation_weighted_f1),
            ],
            Self::Test(test) => vec![
                ("test/loss", test.test_loss),
                ("test/accuracy", test.test_accuracy),
                ("test/macro_f1", test.test_macro_f1),
                ("test/micro_f1", test.test_micro_f1),
                ("test/weighted_f1", test.test_weighted_f1),
            ],
        };
        figures.retain(|(_, value)| value.is_finite());
        figures
    }
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let epoch = (self.epoch * 100.0).round() / 100.0; // 0.52, and 2 instead of 2.00
        write!(
            f,
            "epoch={epoch} step={} train_loss={:.4} validation_loss={:.4} validation_macro_f1={:.4} \
             validation_accuracy={:.4} validation_micro_f1={:.4} validation_weighted_f1={:.4} best={}",
            self.step,
            self.train_loss,
            self.validation_loss,
            self.validation_macro_f1,
            self.validation_accuracy,
            self.validation_micro_f1,
            self.validation_weighted_f1,
            self.best,
        )
    }
}

/// Seconds since 1970, to the millisecond.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |age| age.as_millis() as f64 / 1000.0)
}

/// JSON has no NaN and no infinity: serde_json writes `null` for them.
fn nan_from_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
