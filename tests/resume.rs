//! Real processes, really killed: a run goes on from its last checkpoint to the same bits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use sha2::{Digest, Sha256};

use crate::support::kiln;

pub const STEPS: u64 = 300;

/// A small experiment in a folder of its own: 3 labels, dropout, two evaluations an epoch.
pub fn experiment(folder: &Path) -> PathBuf {
    let words = ["audit", "policy", "breach", "invoice", "tunnel", "cipher", "lease", "vendor", "quorum", "patch"];
    let rows: String = (0..180usize)
        .map(|i| {
            let text: Vec<_> = (0..4 + i % 23).map(|j| words[(i * 31 + j * j * 7 + (i % 3) * j) % 10]).collect();
            format!("{{\"text\": \"row {i} {}\", \"label\": \"label {}\"}}\n", text.join(" "), i % 3)
        })
        .collect();
    fs::write(folder.join("rows.jsonl"), rows).unwrap();
    let file = folder.join("experiment.toml");
    fs::write(
        &file,
        format!(
            r#"name = "killed"
root = "runs"
[data]
source = "rows.jsonl"
split = {{ validation = 0.2, test = 0.2, seed = 1 }}
max_length = 32
[[model]]
name = "tiny"
architecture = "bert"
config = {{ hidden_size = 32, num_hidden_layers = 2, num_attention_heads = 2, intermediate_size = 64, max_position_embeddings = 32 }}
tokenizer = {{ vocab_size = 200 }}
[train]
max_steps = {STEPS}
batch_size = 24
micro_batch_tokens = 128
learning_rate = 1e-3
eval_steps = 17
save_steps = 5
threads = 2
"#
        ),
    )
    .unwrap();
    file
}

pub fn train(file: &Path) -> Command {
    let mut command = kiln();
    command.args(["train", "--offline", "--stop-after", "train"]).arg(file);
    command
}

pub fn model_dir(file: &Path) -> PathBuf {
    file.with_file_name("runs/killed/runs/1/tiny")
}

pub fn weights(file: &Path) -> String {
    let bytes = fs::read(model_dir(file).join("model/model.safetensors")).unwrap();
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The evaluations of metrics.jsonl: the whole curve, not only its end.
pub fn evaluations(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(model_dir(file).join("metrics.jsonl")).unwrap();
    text.lines().filter(|line| line.contains("\"evaluation\"")).map(str::to_owned).collect()
}

pub fn logged_step(file: &Path) -> u64 {
    let text = fs::read_to_string(model_dir(file).join("metrics.jsonl")).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let last = whole.lines().last().and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    last.and_then(|record| record["step"].as_u64()).unwrap_or(0)
}

pub fn newest_checkpoint(file: &Path) -> Option<u64> {
    let entries = fs::read_dir(model_dir(file).join("checkpoints")).ok()?;
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).max()
}

pub fn wait(mut child: Child) -> Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(120), "kiln does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn reference() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = experiment(folder.path());
    let output = train(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (folder, file)
}

#[test]
fn ten_kills_leave_no_trace() {
    let (_reference, reference) = reference();
    let folder = tempfile::tempdir().unwrap();
    let file = experiment(folder.path());

    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("moments drawn from {seed}");
    let draw = |i: u64| {
        (seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33
    };
    let mut moments: Vec<u64> = (0..10).map(|i| 6 + draw(i) % 74).collect();
    moments.sort();
    for (i, &moment) in moments.iter().enumerate() {
        let checkpoint = newest_checkpoint(&file);
        let moment = moment.max(logged_step(&file) + 1); // past what the process before it had logged
        let mut child = train(&file).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while logged_step(&file) < moment || newest_checkpoint(&file).is_none() {
            assert!(child.try_wait().unwrap().is_none(), "kiln ended before step {moment}");
            assert!(started.elapsed() < Duration::from_secs(120), "kiln does not reach step {moment}");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(draw(100 + i as u64) % 9000));
        child.kill().unwrap(); // SIGKILL
        let stderr = String::from_utf8_lossy(&wait(child).stderr).into_owned();
        match checkpoint {
            Some(step) => assert!(stderr.contains(&format!("resuming killed/1 at step {step}")), "{stderr}"),
            None => assert!(!stderr.contains("resuming"), "{stderr}"),
        }
    }
    let output = train(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("resuming killed/1 at step"));
    assert_eq!(weights(&file), weights(&reference), "the weights of a killed run are those of an uninterrupted one");
    assert_eq!(evaluations(&file), evaluations(&reference), "and so is the way there");
}

#[test]
fn a_signal_saves_and_says_so() {
    let (_reference, reference) = reference();
    for (signal, name, code) in [(libc::SIGTERM, "SIGTERM", 143), (libc::SIGINT, "SIGINT", 130)] {
        let folder = tempfile::tempdir().unwrap();
        let file = experiment(folder.path());
        let child = train(&file).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while logged_step(&file) < 20 {
            assert!(started.elapsed() < Duration::from_secs(120), "kiln does not reach step 20");
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: the child is ours and has not been waited for.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
        let output = wait(child);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        let step = newest_checkpoint(&file).unwrap();
        assert!(step >= 20 && stderr.contains(&format!("{name}: checkpoint of step {step} written")), "{stderr}");
        let output = train(&file).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stderr).contains(&format!("resuming killed/1 at step {step}")));
        assert_eq!(weights(&file), weights(&reference));
    }
}

#[test]
fn the_cut_of_a_batch_changes_no_more_than_rounding() {
    // The global batch is what the experiment says; micro-batches only divide it.
    let losses = |set: &str| {
        let folder = tempfile::tempdir().unwrap();
        let file = experiment(folder.path());
        let output = train(&file).args(["--set", set, "--set", "train.max_steps=6"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = fs::read_to_string(model_dir(&file).join("metrics.jsonl")).unwrap();
        let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
        let norms: Vec<f64> = text.lines().filter_map(|line| step(line)["grad_norm"].as_f64()).collect();
        norms
    };
    let whole = losses("train.micro_batch_tokens=4096");
    assert_eq!(whole.len(), 6);
    for set in ["train.micro_batch_tokens=64", "train.gradient_accumulation_steps=7"] {
        for (a, b) in losses(set).iter().zip(&whole) {
            assert!((a - b).abs() <= 1e-4 * b, "{set}: a gradient's norm of {a} instead of {b}");
        }
    }
}
