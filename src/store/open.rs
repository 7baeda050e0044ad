//! Which run a training goes on with, and holding it.

use std::fs;
use std::ops::Deref;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::file::TEMPORARY;
use super::lock::{Lock, now};
use super::{Experiment, JobType, Pins, RunDir, RunRecord, Status, publish, stage, write_bytes, write_json};
use crate::config::{Config, RunNum};
use crate::user_error;

/// The file whose lock says who holds a run, or chooses one.
pub(super) const LOCK: &str = ".lock";

/// What the user asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The newest unfinished run with the same configuration and data, else a new one.
    #[default]
    Auto,
    /// A new run.
    New,
    /// This run, which must be unfinished and have the same configuration and data.
    Resume(RunDir),
}

/// A run that this process alone holds, until it is dropped.
#[derive(Debug)]
pub struct Run {
    run: RunDir,
    _lock: Lock,
}

/// A run to go on with.
#[derive(Debug)]
pub struct Opened {
    /// The run, held.
    pub run: Run,
    /// Whether it was there before.
    pub resumed: bool,
}

impl Deref for Run {
    type Target = RunDir;

    fn deref(&self) -> &RunDir {
        &self.run
    }
}

impl Run {
    /// Says in run.json how the run ended.
    ///
    /// # Errors
    /// run.json cannot be written.
    pub fn finish(&self, status: Status) -> Result<()> {
        self.update(|record| record.status = status)
    }

    fn update(&self, change: impl FnOnce(&mut RunRecord)) -> Result<()> {
        let mut record = self.run.record()?;
        change(&mut record);
        write_json(&self.run.record_path(), &record)
    }
}

impl RunDir {
    /// Holds a run that is there, as a training does, against others that would write into it.
    ///
    /// # Errors
    /// Another process holds it, which the error names.
    pub fn hold(&self) -> Result<Lock> {
        Lock::take(&self.dir().join(LOCK), &format!("run {}", self.reference()))
    }
}

impl Experiment {
    /// Chooses the run for `config` on the data's `snapshot`, which lies in `snapshot_dir`, makes it
    /// where it is new, and holds it.
    ///
    /// # Errors
    /// The user's: the run chosen is finished, was made from another configuration or other data
    /// (each difference is named), or is held by another process (which is named).
    pub fn open_run(&self, config: &Config, snapshot: &str, snapshot_dir: &Path, choice: &Choice) -> Result<Opened> {
        let runs = self.runs();
        fs::create_dir_all(&runs).with_context(|| format!("cannot create {}", runs.display()))?;
        // Choosing and taking are one step: two trainings that start at once take two numbers.
        let _choosing = Lock::wait(&runs.join(LOCK))?;
        clean(&runs, false)?;
        let existing = match (choice, config.run_num) {
            (Choice::Resume(run), RunNum::Number(number)) if run.run_num() != number => {
                return Err(user_error!("--resume {} against run_num = {number}: give one of them", run.reference()));
            }
            (Choice::Resume(run), _) => Some(self.unfinished(run, config, snapshot)?),
            (Choice::New, RunNum::Number(number)) if self.run(number).dir().exists() => {
                return Err(user_error!(
                    "--new against run_num = {number}: {} is there already",
                    self.run(number).reference()
                ));
            }
            (Choice::Auto, RunNum::Number(number)) if self.run(number).dir().exists() => {
                Some(self.unfinished(&self.run(number), config, snapshot)?)
            }
            (Choice::Auto, RunNum::Next) => self.newest_unfinished(config, snapshot)?,
            (Choice::New, _) | (Choice::Auto, RunNum::Number(_)) => None,
        };
        let opened = match existing {
            Some(run) => {
                let changed = run.pins()?.changed_base(config, snapshot)?;
                if !changed.is_empty() {
                    return Err(user_error!(
                        "{} cannot go on, because what it started from is not what it was: {}; put that back, or \
                         start another run with --new",
                        run.reference(),
                        changed.join(", ")
                    ));
                }
                self.resume(run)
            }
            None => {
                let run_num = match config.run_num {
                    RunNum::Number(number) => number,
                    RunNum::Next => self.next_run_num()?,
                };
                self.create(run_num, config, snapshot)
            }
        }?;
        let elsewhere = if snapshot_dir == opened.run.experiment().data_dir().join(snapshot) {
            None
        } else {
            let full = std::path::absolute(snapshot_dir);
            Some(full.with_context(|| format!("cannot find {}", snapshot_dir.display()))?)
        };
        opened.run.update(|record| {
            record.status = Status::Training;
            record.snapshot_dir = elsewhere;
        })?;
        Ok(opened)
    }

    /// The newest run that `config` can go on with.
    fn newest_unfinished(&self, config: &Config, snapshot: &str) -> Result<Option<RunDir>> {
        let hash = config.hash();
        for run_num in self.run_nums().into_iter().rev() {
            let run = self.run(run_num);
            // A folder that is no run has only its number to say.
            let Ok(record) = run.record() else { continue };
            if record.job_type == JobType::Training
                && record.status != Status::Finished
                && record.config_hash == hash
                && record.snapshot == snapshot
            {
                return Ok(Some(run));
            }
        }
        Ok(None)
    }

    /// `run`, if `config` can go on with it.
    fn unfinished(&self, run: &RunDir, config: &Config, snapshot: &str) -> Result<RunDir> {
        let reference = run.reference();
        if run.experiment().name() != self.name() {
            return Err(user_error!("{reference} is not a run of the experiment {:?}", self.name()));
        }
        if run.record()?.status == Status::Finished {
            return Err(user_error!("{reference} is finished; --new, or run_num = \"next\", starts another"));
        }
        let differences = run.pins()?.differences(config, snapshot);
        if !differences.is_empty() {
            return Err(user_error!(
                "{reference} cannot go on, because it was started otherwise:\n  {}\nput that back, or start another with --new",
                differences.join("\n  ")
            ));
        }
        Ok(run.clone())
    }

    fn resume(&self, run: RunDir) -> Result<Opened> {
        let lock = run.hold()?;
        clean(&run.dir(), true)?;
        Ok(Opened { run: Run { run, _lock: lock }, resumed: true })
    }

    fn create(&self, run_num: u32, config: &Config, snapshot: &str) -> Result<Opened> {
        let run = self.run(run_num);
        let pins = Pins::new(config, snapshot)?;
        let record = RunRecord {
            job_type: JobType::Training,
            experiment: self.name().into(),
            run_num,
            models: config.models.iter().map(|model| model.name.clone()).collect(),
            snapshot: snapshot.into(),
            snapshot_dir: None,
            status: Status::Training,
            config_hash: pins.config_hash.clone(),
            start: now(),
        };
        // The folder appears with its three files in it, so that no run is without them.
        let staged = stage(&run.dir())?;
        write_bytes(&staged.path().join("experiment.toml"), config.text.as_bytes())?;
        write_json(&staged.path().join("lock.json"), &pins)?;
        write_json(&staged.path().join("run.json"), &record)?;
        publish(staged, &run.dir())?;
        let lock = Lock::take(&run.dir().join(LOCK), &format!("run {}", run.reference()))?;
        Ok(Opened { run: Run { run, _lock: lock }, resumed: false })
    }
}

/// Waits until no other process makes something in `dir`, and removes what killed ones left there; `deep`, below
/// it too.
///
/// # Errors
/// What the file system says.
pub fn exclusive(dir: &Path, deep: bool) -> Result<Lock> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let lock = Lock::wait(&dir.join(LOCK))?;
    clean(dir, deep)?;
    Ok(lock)
}

/// Removes what a killed process left unfinished in a folder that nobody else writes to now, and,
/// if `deep`, below it.
fn clean(dir: &Path, deep: bool) -> Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", dir.display()))?;
        let (path, is_dir) = (entry.path(), entry.file_type().is_ok_and(|kind| kind.is_dir()));
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
                .with_context(|| format!("cannot remove {}, which a killed process left", path.display()))?;
        } else if is_dir && deep {
            clean(&path, deep)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::config::Overrides;
    use crate::error::UserError;
    use crate::store::find;

    const TEXT: &str = "name = \"x\"\ndata.source = \"sample\"\n[[model]]\nname = \"m\"\narchitecture = \"bert\"\n";

    fn config(sets: &[&str]) -> Config {
        let overrides = Overrides { sets: sets.iter().map(|set| set.to_string()).collect(), ..Overrides::default() };
        Config::parse(TEXT, "x.toml", Path::new(""), &overrides).unwrap()
    }

    /// The number of the run that is opened, and whether it was there; or the error.
    fn open(root: &Path, sets: &[&str], snapshot: &str, choice: &Choice, end: Status) -> Result<(u32, bool), String> {
        let experiment = Experiment::new(root, "x");
        let folder = experiment.data_dir().join(snapshot);
        let opened = experiment.open_run(&config(sets), snapshot, &folder, choice).map_err(|error| {
            assert!(error.is::<UserError>(), "{error:?}");
            error.to_string()
        })?;
        opened.run.finish(end).unwrap();
        Ok((opened.run.run_num(), opened.resumed))
    }

    #[test]
    fn the_rules_of_resuming() {
        use Choice::{Auto, New, Resume};
        use Status::{Failed, Finished, Interrupted, Training};
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let run = |number| Resume(Experiment::new(root, "x").run(number));
        let open = |sets: &[&str], snapshot, choice, end| open(root, sets, snapshot, &choice, end);

        assert_eq!(open(&[], "a", Auto, Interrupted), Ok((1, false)));
        assert_eq!(open(&["train.threads=1"], "a", Auto, Training), Ok((1, true)), "threads decide nothing");
        assert_eq!(open(&[], "b", Auto, Failed), Ok((2, false)), "other data");
        assert_eq!(open(&["train.seed=1"], "a", Auto, Training), Ok((3, false)), "another configuration");
        assert_eq!(open(&[], "a", New, Training), Ok((4, false)));
        assert_eq!(open(&[], "a", Auto, Finished), Ok((4, true)), "the newest unfinished");
        assert_eq!(open(&[], "a", Auto, Finished), Ok((1, true)), "the other one");
        assert_eq!(open(&[], "a", Auto, Finished), Ok((5, false)), "all are finished");
        assert_eq!(open(&[], "b", run(2), Failed), Ok((2, true)), "a failed run goes on");
        assert_eq!(open(&["run_num=9"], "a", Auto, Training), Ok((9, false)));
        assert_eq!(open(&["run_num=9"], "a", Auto, Finished), Ok((9, true)));
        assert_eq!(open(&[], "a", New, Training), Ok((10, false)));

        let finished = "x/9 is finished; --new, or run_num = \"next\", starts another";
        assert_eq!(open(&["run_num=9"], "a", Auto, Training), Err(finished.into()));
        assert_eq!(open(&[], "a", run(9), Training), Err(finished.into()));
        assert_eq!(
            open(&["run_num=9"], "a", New, Training),
            Err("--new against run_num = 9: x/9 is there already".into())
        );
        assert_eq!(
            open(&["run_num=9"], "a", run(2), Training),
            Err("--resume x/2 against run_num = 9: give one of them".into())
        );
        assert_eq!(
            open(&["train.epochs=4"], "b", run(3), Training),
            Err("x/3 cannot go on, because it was started otherwise:\n  \
                 model.0.train.duration.epochs: 3 then, 4 now\n  model.0.train.seed: 1 then, 42 now\n  \
                 the data: snapshot a then, b now\nput that back, or start another with --new"
                .into())
        );
    }

    #[test]
    fn a_new_run_says_what_it_is_and_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let opened = Experiment::new(dir.path(), "x")
            .open_run(&config(&["train.seed=1"]), "a", Path::new("/given/a"), &Choice::Auto)
            .unwrap();
        let run = opened.run.deref();
        assert_eq!(
            std::fs::read_to_string(run.dir().join("experiment.toml")).unwrap(),
            format!("# --set train.seed=1\n{TEXT}")
        );
        assert_eq!(run.snapshot_dir().unwrap(), Path::new("/given/a"));
        let pins = run.pins().unwrap();
        assert_eq!(pins.config, Config { text: String::new(), sets: Vec::new(), ..config(&["train.seed=1"]) });
        assert_eq!(pins.sets, ["train.seed=1"]);
        assert_eq!((pins.snapshot.as_str(), pins.base.len()), ("a", 0));
        let record = run.record().unwrap();
        assert_eq!((record.status, record.models), (Status::Training, vec!["m".to_owned()]));

        for reference in [None, Some("x"), Some("x/1"), run.dir().to_str()] {
            let found = find(reference, dir.path()).unwrap();
            assert_eq!(found.record().unwrap().run_num, 1, "{reference:?}");
            assert_eq!(found.reference(), "x/1");
        }
        let missing = find(Some("x/2"), dir.path()).unwrap_err().to_string();
        let expected = format!(
            "no run \"x/2\": needs a run's folder or experiment/run_num under {}; there are x/1",
            dir.path().display()
        );
        assert_eq!(missing, expected);
    }

    #[test]
    fn what_a_killed_process_left_is_gone_when_its_run_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let experiment = Experiment::new(dir.path(), "x");
        open(dir.path(), &[], "a", &Choice::Auto, Status::Interrupted).unwrap();
        let checkpoints = experiment.run(1).model("m").checkpoints();
        for left in [checkpoints.join(".tmp-1/deep"), experiment.runs().join(".tmp-2"), checkpoints.join("20")] {
            fs::create_dir_all(left).unwrap();
        }
        fs::write(experiment.run(1).dir().join(".tmp-run.json"), "half").unwrap();
        assert_eq!(open(dir.path(), &[], "a", &Choice::Auto, Status::Training), Ok((1, true)));
        assert!(!checkpoints.join(".tmp-1").exists() && !experiment.runs().join(".tmp-2").exists());
        assert!(!experiment.run(1).dir().join(".tmp-run.json").exists() && checkpoints.join("20").exists());
    }

    #[test]
    fn trainings_that_start_at_once_take_a_run_each() {
        let dir = tempfile::tempdir().unwrap();
        let start = || open(dir.path(), &[], "a", &Choice::New, Status::Training).unwrap().0;
        let mut numbers: Vec<u32> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        numbers.sort_unstable();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    const HOLD: &str = "KILN_TEST_HOLD";

    /// Another process, which is this test binary, that holds run 1 until it is killed.
    fn hold(root: &Path) -> Child {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["store::open::tests::holds_a_run_for_another_test", "--exact", "--nocapture"])
            .env(HOLD, root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("held")));
        child
    }

    #[test]
    fn holds_a_run_for_another_test() {
        let Some(root) = std::env::var_os(HOLD) else { return };
        let _held =
            Experiment::new(Path::new(&root), "x").open_run(&config(&[]), "a", Path::new("a"), &Choice::Auto).unwrap();
        println!("held");
        let _ = std::io::stdin().read_line(&mut String::new());
    }

    #[test]
    fn a_run_that_another_process_holds_is_refused_until_that_ends() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = hold(dir.path());
        let refused = open(dir.path(), &[], "a", &Choice::Auto, Status::Training).unwrap_err();
        assert!(refused.starts_with(&format!("run x/1 is held by process {} on ", child.id())), "{refused}");
        assert_eq!(open(dir.path(), &[], "a", &Choice::New, Status::Finished), Ok((2, false)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(open(dir.path(), &[], "a", &Choice::Auto, Status::Training), Ok((1, true)));
    }
}
