//! A disk that is full, and one that may not be written to.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::{WHOLE, command, copy, tree};
use crate::support::skipped;

/// A file system of its own, for as long as this lives.
struct Mounted {
    folder: tempfile::TempDir,
}

impl Mounted {
    /// `None`, after saying so, where this user or this container may not mount.
    fn new(arguments: &[&str]) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let output = Command::new("mount").args(arguments).arg(folder.path()).output();
        match output {
            Ok(output) if output.status.success() => return Some(Self { folder }),
            Ok(output) => skipped(&format!("mount: {}", String::from_utf8_lossy(&output.stderr).trim())),
            Err(error) => skipped(&format!("mount: {error}")),
        }
        None
    }

    fn again(&self, options: &str) {
        let mount = Command::new("mount").args(["-o", options]).arg(self.folder.path()).status();
        assert!(mount.unwrap().success(), "mount -o {options}");
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.folder.path()).status();
    }
}

/// The whole way of first.toml, with its runs under `root`.
fn train(root: &Path) -> Output {
    command(WHOLE.path(), &["train", "first.toml", "--root", root.to_str().unwrap()]).output().unwrap()
}

/// What tells one training from another: its weights and the evaluations on the way.
fn made(root: &Path) -> (Vec<u8>, Vec<String>) {
    let model = root.join("hostile/runs/1/base");
    let metrics = fs::read_to_string(model.join("metrics.jsonl")).unwrap();
    let evaluations = metrics.lines().filter(|line| line.contains("\"evaluation\"")).map(str::to_owned).collect();
    (fs::read(model.join("model/model.safetensors")).unwrap(), evaluations)
}

/// How far a run under `root` came.
fn stage(root: &Path) -> &'static str {
    let model = root.join("hostile/runs/1/base");
    let stages = [
        (model.join("model.onnx"), "testing"),
        (model.join("model"), "exporting"),
        (model.join("checkpoints/1"), "between checkpoints"),
        (root.join("hostile/runs/1"), "before a checkpoint"),
    ];
    stages.iter().find(|(path, _)| path.exists()).map_or("preparing", |(_, stage)| stage)
}

/// Refuses a file that is not whole, and one that should be gone.
fn whole(root: &Path) {
    for file in tree(root).into_keys() {
        let (path, text) = (root.join(&file), file.display().to_string());
        assert!(!text.contains(".tmp-"), "{text} is left");
        if text.ends_with(".json") {
            let read = serde_json::from_slice::<serde_json::Value>(&fs::read(&path).unwrap());
            read.unwrap_or_else(|error| panic!("{text}: {error}"));
        }
        if text.ends_with(".safetensors") {
            let bytes = fs::read(&path).unwrap();
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
            let ends = header.as_object().unwrap().values().filter_map(|tensor| tensor["data_offsets"][1].as_u64());
            assert_eq!(bytes.len() as u64, 8 + header_len(&bytes) + ends.max().unwrap(), "{text}");
        }
    }
    let checkpoints = root.join("hostile/runs/1/base/checkpoints");
    for step in fs::read_dir(checkpoints).into_iter().flatten().map(|entry| entry.unwrap().path()) {
        for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
            assert!(step.join(file).is_file(), "{} has no {file}", step.display());
        }
    }
}

fn header_len(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

#[test]
fn a_full_disk_ends_cleanly_and_the_run_goes_on_when_there_is_room() {
    let reference = tempfile::tempdir().unwrap();
    let output = train(reference.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let reference = made(reference.path());
    let mut stages = BTreeSet::new();
    for kilobytes in (16..).step_by(28) {
        let Some(disk) = Mounted::new(&["-t", "tmpfs", "-o", &format!("size={kilobytes}k"), "tmpfs"]) else { return };
        let output = train(disk.path());
        if output.status.success() {
            break;
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{kilobytes} kB: {stderr}");
        assert!(stderr.contains("No space left on device"), "{kilobytes} kB: {stderr}");
        assert!(stderr.contains(disk.path().to_str().unwrap()) && !stderr.contains("panicked"), "{stderr}");
        whole(disk.path());
        if stages.insert(stage(disk.path())) {
            disk.again("remount,size=64m");
            let output = train(disk.path());
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert!(made(disk.path()) == reference, "after {kilobytes} kB it is another model");
            whole(disk.path());
        }
    }
    println!("full while {stages:?}");
    for stage in ["preparing", "exporting", "testing"] {
        assert!(stages.contains(stage), "the disk was never full while {stage}: {stages:?}");
    }
    assert!(stages.iter().any(|stage| stage.ends_with("checkpoint") || stage.ends_with("checkpoints")), "{stages:?}");
}

#[test]
fn what_may_not_be_written_is_named() {
    let folder = copy();
    let Some(disk) = Mounted::new(&["--bind", folder.path().to_str().unwrap()]) else { return };
    disk.again("remount,ro,bind");
    let kiln = |arguments: &[&str]| {
        let output = command(disk.path(), arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (arguments, file) in [
        (&["train", "experiment.toml"][..], "kiln-runs/hostile"),
        (&["train", "experiment.toml", "--root", "new"], "new/hostile"),
        (&["prepare", "experiment.toml", "--set", "data.split.seed=7"], "kiln-runs/hostile/data"),
        (&["infer", "hostile/1"], "kiln-runs/hostile/runs/1/.lock"),
        (&["export", "hostile/1"], "kiln-runs/hostile/runs/1/.lock"),
        (&["compare", "hostile/1"], "kiln-runs/hostile/runs/1/.lock"),
        (&["sample", "--output", "sample.csv"], "sample.csv"),
    ] {
        let (code, stderr) = kiln(arguments);
        assert_eq!(code, Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.contains("Read-only file system") && stderr.contains(file), "{arguments:?}: {stderr}");
    }
    // What only reads the run, and writes elsewhere, goes on.
    let elsewhere: PathBuf = tempfile::tempdir().unwrap().keep();
    let output = elsewhere.join("predictions.parquet");
    let input = ["infer", "hostile/1", "--model", "a", "--input", "rows.csv", "--output", output.to_str().unwrap()];
    let (code, stderr) = kiln(&input);
    assert_eq!((code, output.is_file()), (Some(0), true), "{stderr}");
    fs::remove_dir_all(elsewhere).unwrap();
}
