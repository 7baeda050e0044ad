//! What happens in a training, as typed events: one JSON object a line in `metrics.jsonl`.
//!
//! The file grows while the training runs and holds whole records only: a line that a killed
//! process left unfinished is never read, and [`MetricsLog::cut_back`] takes it away on resume.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, Serialize};

use crate::store;

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Some optimizer steps were made.
    Step(Step),
    /// The model was evaluated on the validation part.
    Evaluation(Evaluation),
}

/// Where the training stands after some optimizer steps.
///
/// A value that is not finite is `null` in the file and NaN where it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Optimizer steps made so far.
    pub step: u64,
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

/// JSON has no NaN and no infinity: serde_json writes `null` for them.
fn nan_from_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// A `metrics.jsonl` that is being written.
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the file to append to, and makes it where there is none.
    ///
    /// A run that goes on from a checkpoint calls [`cut_back`](Self::cut_back) before it appends.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("cannot open {} to append to it", path.display()))?;
        let path = path.to_owned();
        Ok(Self { path, file })
    }

    /// Appends one event as a whole line, handed to the system before this returns.
    pub fn append(&mut self, event: &Event) -> Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        // One write, past any buffer: a reader or a crash sees the line or does not.
        self.file.write_all(&line).with_context(|| format!("cannot append to {}", self.path.display()))
    }

    /// Drops the records after `step`, the checkpoint's, and a cut last line, so that the steps
    /// that are made again are not told twice. The others keep their bytes.
    ///
    /// # Errors
    /// Where a whole line is no record; the file is left as it is.
    pub fn cut_back(&mut self, step: u64) -> Result<()> {
        #[derive(Deserialize)]
        struct Position {
            step: u64,
        }
        let text = read_text(&self.path)?;
        let mut kept = String::with_capacity(text.len());
        for (number, line) in whole_lines(&text) {
            let position: Position = record(&self.path, number, line)?;
            if position.step <= step {
                kept.push_str(line);
                kept.push('\n');
            }
        }
        if kept != text {
            store::write_bytes(&self.path, kept.as_bytes())?;
            *self = Self::open(&self.path)?; // the old handle still writes to the replaced file
        }
        Ok(())
    }
}

/// Reads a `metrics.jsonl`, also one that is being written.
///
/// # Errors
/// Where the file cannot be read, or a whole line is no record: the error names it.
pub fn read(path: &Path) -> Result<Vec<Event>> {
    let text = read_text(path)?;
    whole_lines(&text).map(|(number, line)| record(path, number, line)).collect()
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    // Broken bytes are no reason to lose the rest: the line that holds them is refused by number.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The lines that end in a newline, with their numbers from 1.
fn whole_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    (1..).zip(whole.lines())
}

fn record<'a, T: Deserialize<'a>>(path: &Path, number: usize, line: &'a str) -> Result<T> {
    serde_json::from_str(line).with_context(|| {
        let start: String = line.chars().take(80).collect();
        format!("{} line {number} is no event: `{start}`; take the line out to go on without it", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Event {
        Event::Step(Step {
            step,
            epoch: 0.1 * step as f64,
            train_loss: 1.0 / step as f64,
            learning_rate: 5e-5,
            grad_norm: 1.5,
            tokens_per_second: 1234.0,
        })
    }

    fn evaluation(step: u64) -> Evaluation {
        Evaluation {
            step,
            epoch: 1.999999,
            train_loss: 0.1234,
            validation_loss: 0.21,
            validation_accuracy: 0.975,
            validation_macro_f1: 0.973,
            validation_micro_f1: 0.975,
            validation_weighted_f1: 0.9742,
            best: true,
        }
    }

    #[test]
    fn an_event_is_one_flat_line() {
        assert_eq!(
            serde_json::to_string(&step(2)).unwrap(),
            r#"{"event":"step","step":2,"epoch":0.2,"train_loss":0.5,"learning_rate":0.00005,"grad_norm":1.5,"tokens_per_second":1234.0}"#
        );
        let json = serde_json::to_string(&Event::Evaluation(evaluation(3))).unwrap();
        assert!(json.starts_with(r#"{"event":"evaluation","step":3,"epoch":1.999999,"train_loss":"#));
        assert_eq!(
            evaluation(300).to_string(),
            "epoch=2 step=300 train_loss=0.1234 validation_loss=0.2100 validation_macro_f1=0.9730 \
             validation_accuracy=0.9750 validation_micro_f1=0.9750 validation_weighted_f1=0.9742 best=true"
        );
    }

    #[test]
    fn what_was_appended_is_read_and_nan_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path).unwrap();
        log.append(&step(1)).unwrap();
        let Event::Step(mut broken) = step(2) else { unreachable!() };
        broken.grad_norm = f64::INFINITY;
        log.append(&Event::Step(broken)).unwrap();
        drop(log);
        let mut log = MetricsLog::open(&path).unwrap();
        log.append(&Event::Evaluation(evaluation(2))).unwrap();
        let events = read(&path).unwrap();
        assert_eq!((&events[0], &events[2]), (&step(1), &Event::Evaluation(evaluation(2))));
        assert!(matches!(&events[1], Event::Step(s) if s.grad_norm.is_nan() && s.step == 2));
    }

    #[test]
    fn cut_back_leaves_what_the_checkpoint_knows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path).unwrap();
        for i in 1..=4 {
            log.append(&step(i)).unwrap();
        }
        log.append(&Event::Evaluation(evaluation(4))).unwrap();
        fs::write(&path, fs::read_to_string(&path).unwrap() + r#"{"event":"st"#).unwrap();
        assert_eq!(read(&path).unwrap().len(), 5, "a cut last line is no record");

        log.cut_back(3).unwrap();
        log.append(&step(4)).unwrap();
        assert_eq!(read(&path).unwrap(), [1, 2, 3, 4].map(step));
        log.cut_back(0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn a_bad_record_is_named_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let line = serde_json::to_string(&step(1)).unwrap();
        let text = format!("{line}\n{{\"event\":\"step\"}}\n{line}\n");
        fs::write(&path, &text).unwrap();
        for error in [read(&path).unwrap_err(), MetricsLog::open(&path).unwrap().cut_back(0).unwrap_err()] {
            assert!(error.to_string().contains("metrics.jsonl line 2 is no event"), "{error}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}
