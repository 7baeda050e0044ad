//! A run that is a comparison of other runs.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::lock::{Lock, now};
use super::open::LOCK;
use super::{Experiment, JobType, RunDir, RunRecord, Status, publish, stage, write_json};

impl Experiment {
    /// Makes a new run of `comparison`, of the models of these names on a snapshot: run.json and
    /// comparison.json, and nothing else. The snapshot's folder is given where it is not the experiment's.
    ///
    /// # Errors
    /// What the file system says; nothing is left behind then.
    pub fn add_comparison(
        &self,
        models: Vec<String>,
        snapshot: &str,
        snapshot_dir: Option<PathBuf>,
        comparison: &impl Serialize,
    ) -> Result<RunDir> {
        let runs = self.runs();
        fs::create_dir_all(&runs).with_context(|| format!("cannot create {}", runs.display()))?;
        let _choosing = Lock::wait(&runs.join(LOCK))?;
        let run = self.run(self.next_run_num()?);
        let record = RunRecord {
            job_type: JobType::Comparison,
            experiment: self.name().into(),
            run_num: run.run_num(),
            models,
            snapshot: snapshot.into(),
            snapshot_dir,
            status: Status::Finished,
            config_hash: String::new(),
            start: now(),
        };
        let staged = stage(&run.dir())?;
        write_json(&staged.path().join("comparison.json"), comparison)?;
        write_json(&staged.path().join("run.json"), &record)?;
        publish(staged, &run.dir())?;
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::find;

    #[test]
    fn it_takes_a_number_and_is_not_the_newest_with_models() {
        let dir = tempfile::tempdir().unwrap();
        let experiment = Experiment::new(dir.path(), "x");
        let add = || experiment.add_comparison(vec!["a".into(), "b".into()], "s", None, &[1]).unwrap();
        assert_eq!((add().run_num(), add().run_num()), (1, 2));
        let run = find(Some("x/2"), dir.path()).unwrap();
        let record = run.record().unwrap();
        assert_eq!((record.job_type, record.status), (JobType::Comparison, Status::Finished));
        assert_eq!((record.models, record.config_hash), (vec!["a".to_owned(), "b".to_owned()], String::new()));
        assert!(run.comparison_json().is_file());
        assert!(find(None, dir.path()).unwrap_err().to_string().starts_with("no run under"));
        assert!(find(Some("x"), dir.path()).is_err());
    }
}
