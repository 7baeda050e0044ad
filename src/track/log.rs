//! `metrics.jsonl`: one event a line.
//!
//! The file grows while the training runs and holds whole records only: a line that a killed
//! process left unfinished is never read, and [`MetricsLog::cut_back`] takes it away on resume.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Sink;
use super::event::Event;
use super::records::RecordFile;
use crate::store;

/// A `metrics.jsonl` that is being written.
pub(super) struct MetricsLog {
    path: PathBuf,
    file: RecordFile,
}

impl MetricsLog {
    /// Opens the file to append to, and makes it where there is none.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), file: RecordFile::open(path)? })
    }
}

impl Sink for MetricsLog {
    fn append(&mut self, event: &Event) -> Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.file.append(&line)
    }

    /// Where a whole line is no record that is an error, and the file is left as it is.
    fn cut_back(&mut self, step: u64) -> Result<()> {
        let text = read_text(&self.path)?;
        let mut kept = String::with_capacity(text.len());
        for (number, line) in whole_lines(&text) {
            let event = record(&self.path, number, line)?;
            if event.step() <= step && !event.is_ending() {
                kept.push_str(line);
                kept.push('\n');
            }
        }
        if kept != text {
            store::write_bytes(&self.path, kept.as_bytes())?;
            self.file = RecordFile::open(&self.path)?; // the old handle still writes to the replaced file
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

fn record(path: &Path, number: usize, line: &str) -> Result<Event> {
    serde_json::from_str(line).with_context(|| {
        let start: String = line.chars().take(80).collect();
        format!("{} line {number} is no event: `{start}`; take the line out to go on without it", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::super::event::{End, Evaluation, Step};
    use super::*;
    use crate::store::Status;

    fn step(step: u64) -> Event {
        Event::Step(Step {
            step,
            time: 1e9,
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
            r#"{"event":"step","step":2,"time":1000000000.0,"epoch":0.2,"train_loss":0.5,"learning_rate":0.00005,"grad_norm":1.5,"tokens_per_second":1234.0}"#
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
        log.cut_back(0).unwrap();
        for i in 1..=4 {
            log.append(&step(i)).unwrap();
        }
        log.append(&Event::Evaluation(evaluation(4))).unwrap();
        fs::write(&path, fs::read_to_string(&path).unwrap() + r#"{"event":"st"#).unwrap();
        assert_eq!(read(&path).unwrap().len(), 5, "a cut last line is no record");

        log.cut_back(3).unwrap();
        log.append(&step(4)).unwrap();
        assert_eq!(read(&path).unwrap(), [1, 2, 3, 4].map(step));
        let end = Event::End(End { step: 4, time: 2e9, status: Status::Finished });
        log.append(&end).unwrap();
        assert_eq!(read(&path).unwrap().last(), Some(&end));
        log.cut_back(u64::MAX).unwrap();
        assert_eq!(read(&path).unwrap(), [1, 2, 3, 4].map(step), "a run that goes on has not ended");
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
