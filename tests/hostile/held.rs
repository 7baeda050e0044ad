//! Two kilns on one run.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::{command, copy};

/// Starts a training that does not end by itself, and waits for its first checkpoint.
fn start(folder: &Path, arguments: &[&str], says: &str) -> Child {
    let command = &mut command(folder, &[&["train", "held.toml", "--stop-after", "train"], arguments].concat());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    assert!(first.contains(says), "{first}");
    std::thread::spawn(move || lines.for_each(drop)); // so that it can go on writing
    let checkpoints = folder.join("kiln-runs/held/runs/1/base/checkpoints");
    let started = Instant::now();
    while fs::read_dir(&checkpoints).map_or(0, |entries| entries.flatten().count()) == 0 {
        assert!(child.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(60), "no checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn a_second_kiln_says_who_holds_the_run_and_a_kill_frees_it() {
    let folder = copy();
    let toml = fs::read_to_string(folder.path().join("first.toml")).unwrap();
    let toml = toml.replace("name = \"hostile\"", "name = \"held\"").replace("max_steps = 2", "max_steps = 1000000");
    fs::write(folder.path().join("held.toml"), toml.replace("save_steps = 1", "save_steps = 20")).unwrap();
    let mut first = start(folder.path(), &[], "run held/1 in");
    let held = format!("run held/1 is held by process {} on ", first.id());
    for (arguments, says) in [
        (&["train", "held.toml"][..], &*held),
        (&["train", "held.toml", "--resume", "held/1"], &held),
        (&["infer", "held/1"], &held),
        (&["export", "held/1"], &held),
        (&["infer", "held/1", "--input", "rows.csv", "--output", "x.parquet"], "model.onnx is not there"),
        (&["compare", "held/1"], "a comparison needs two"),
        (&["repro", "held/1"], "held/1"),
    ] {
        let output = command(folder.path(), arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(says), "{arguments:?}: {stderr}");
        assert!(first.try_wait().unwrap().is_none(), "{arguments:?} ended the training beside it");
    }
    first.kill().unwrap(); // SIGKILL
    first.wait().unwrap();
    let output = command(folder.path(), &["infer", "held/1"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && stderr.contains("model.onnx is not there"), "{stderr}");
    let mut second = start(folder.path(), &["--resume", "held/1"], "resuming held/1 at step ");
    second.kill().unwrap();
    second.wait().unwrap();
}

/// What a preparation that was killed has left is gone after the next one.
#[test]
fn what_a_killed_preparation_left_is_removed() {
    let folder = copy();
    let data = folder.path().join("kiln-runs/hostile/data");
    let snapshot = fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_dir()).unwrap();
    let left = [data.join(".tmp-1/deep"), snapshot.join("test/.tmp-2"), snapshot.join("training/x/.tmp-3")];
    left.iter().for_each(|left| fs::create_dir_all(left).unwrap());
    let prepare = |sets: &[&str]| {
        let output = command(folder.path(), &[&["prepare", "experiment.toml"], sets].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    prepare(&["--set", "data.max_length=12"]); // another encoding
    prepare(&["--set", "data.split.seed=7"]); // another snapshot
    assert_eq!(left.map(|left| left.exists()), [false; 3]);
}
