//! What `kiln check` says of memory against what the real process takes, and what `train.recompute`
//! changes: memory, and no bit of the weights.

#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::kiln;

/// A BERT whose activations are most of what it takes, on texts that fill `max_length`.
fn experiment(folder: &Path) -> PathBuf {
    let words = ["audit", "policy", "breach", "invoice", "tunnel", "cipher", "lease", "vendor", "quorum", "patch"];
    let rows: String = (0..120usize)
        .map(|i| {
            let text: Vec<_> = (0..140).map(|j| words[(i * 31 + j * j * 7 + (i % 3) * j) % 10]).collect();
            format!("{{\"text\": \"row {i} {}\", \"label\": \"label {}\"}}\n", text.join(" "), i % 3)
        })
        .collect();
    fs::write(folder.join("rows.jsonl"), rows).unwrap();
    let file = folder.join("experiment.toml");
    fs::write(
        &file,
        r#"name = "memory"
root = "runs"
[data]
source = "rows.jsonl"
max_length = 128
[[model]]
name = "bert"
architecture = "bert"
config = { hidden_size = 192, num_hidden_layers = 6, num_attention_heads = 6, intermediate_size = 768 }
tokenizer = { vocab_size = 200 }
[train]
max_steps = 3
batch_size = 32
learning_rate = 1e-3
eval_steps = 3
save_steps = 1
threads = 1 # with more, who frees what before it is asked for again is a matter of timing
"#,
    )
    .unwrap();
    file
}

fn check(file: &Path, sets: &[&str]) -> Value {
    let mut command = kiln();
    command.args(["check", "--json"]).arg(file);
    sets.iter().for_each(|set| _ = command.args(["--set", set]));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["memory"]["bert"].clone()
}

/// The most that was resident at once. The system keeps it for as long as the process lives.
fn peak(command: &mut Command) -> u64 {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(kilobytes) = resident.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok()) {
            peak = peak.max(1024 * kilobytes);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().unwrap().success());
    peak
}

#[test]
fn a_training_takes_what_check_says_and_recompute_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let file = experiment(folder.path());
    let mut taken = Vec::new();
    for (run, set) in [(1, "train.recompute=false"), (2, "train.recompute=true")] {
        let said = check(&file, &[set]);
        assert_eq!((&said["tokens"], &said["from_data"]), (&4096.into(), &(run == 2).into()), "run 1 prepares");
        let mut train = kiln();
        train.args(["train", "--offline", "--stop-after", "train", "--set", set]).arg(&file);
        let (said, peak) = (said["peak_bytes"].as_u64().unwrap(), peak(&mut train));
        let ratio = said as f64 / peak as f64;
        assert!((0.85..1.15).contains(&ratio), "{set}: {said} bytes said, {peak} taken");
        taken.push(peak);
    }
    assert!(taken[1] < taken[0] * 2 / 3, "{taken:?}");

    let weights = [1, 2].map(|run| folder.path().join(format!("runs/memory/runs/{run}/bert/model/model.safetensors")));
    let [kept, recomputed] = weights.map(|file| fs::read(file).unwrap());
    assert!(kept == recomputed, "recompute changes weights");
}

#[test]
fn the_summary_says_what_a_step_takes() {
    let folder = tempfile::tempdir().unwrap();
    let file = experiment(folder.path());
    let output = kiln().arg("check").arg(&file).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let line = stdout.lines().find(|line| line.contains("GB")).unwrap_or_else(|| panic!("{stdout}")).trim();
    let said = check(&file, &[])["peak_bytes"].as_u64().unwrap();
    let start =
        format!("bert: a training step needs about {:.2} GB (weights, gradients and moments ", said as f64 / 1e9);
    assert!(line.starts_with(&start) && line.contains("), 4096 tokens at once"), "{line}");
}
