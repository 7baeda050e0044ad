//! Many processes that train one model: real ones, over real sockets, really killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use crate::resume::{STEPS, evaluations, experiment, logged_step, newest_checkpoint, train, wait, weights};

/// What all others are given to end after one was killed.
const END: Duration = Duration::from_secs(10);

fn by(file: &Path, processes: usize) -> Command {
    let mut command = train(file);
    command.args(["--nproc-per-node", &processes.to_string(), "--set", "train.deterministic=true"]);
    command.args(["--set", "train.threads=1"]);
    command
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = experiment(folder.path());
    (folder, file)
}

fn done(mut command: Command) -> String {
    let output = wait(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    stderr
}

/// The processes that a process has started, by RANK.
fn ranks(agent: &Child) -> Vec<(usize, i32)> {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.id())).unwrap_or_default();
    let rank = |pid: i32| -> Option<(usize, i32)> {
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let mut variables = environment.split(|byte| *byte == 0).filter_map(|v| std::str::from_utf8(v).ok());
        Some((variables.find_map(|v| v.strip_prefix("RANK="))?.parse().ok()?, pid))
    };
    children.split_whitespace().filter_map(|pid| rank(pid.parse().ok()?)).collect()
}

/// Whether a process is there, and no zombie.
fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: the process is a child of our child, which has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// Waits until the training of `file` has logged `step`.
fn until(file: &Path, agent: &mut Child, step: u64) {
    let started = Instant::now();
    while logged_step(file) < step {
        assert!(agent.try_wait().unwrap().is_none(), "kiln ended before step {step}");
        assert!(started.elapsed() < Duration::from_secs(120), "kiln does not reach step {step}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn start(mut command: Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn any_number_of_processes_makes_the_same_model() {
    let (_alone, alone) = folder();
    done(by(&alone, 1));
    for processes in [2, 4] {
        let (_folder, file) = folder();
        done(by(&file, processes));
        assert_eq!(evaluations(&file), evaluations(&alone), "{processes} processes");
        assert_eq!(weights(&file), weights(&alone), "{processes} processes");
    }
    // Without `deterministic` they differ by rounding: the first evaluation's loss shows how little.
    let loss = |file: &Path| {
        let first: serde_json::Value = serde_json::from_str(&evaluations(file)[0]).unwrap();
        first["validation_loss"].as_f64().unwrap()
    };
    let (_folder, file) = folder();
    let mut command = train(&file);
    command.args(["--nproc-per-node", "3", "--set", "train.threads=1", "--set", "train.max_steps=17"]);
    done(command);
    assert!((loss(&file) - loss(&alone)).abs() < 1e-4, "{} {}", loss(&file), loss(&alone));
}

#[test]
fn twenty_kills_leave_no_orphan_and_no_trace() {
    let (_alone, alone) = folder();
    done(by(&alone, 1));
    let (_folder, file) = folder();
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("moments and ranks drawn from {seed}");
    let draw = |i: u64| {
        (seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33
    };
    let mut longest = Duration::ZERO;
    for kill in 0..20 {
        let mut agent = start(by(&file, 4));
        let moment = (logged_step(&file) + 1 + draw(kill) % 10).min(STEPS - 60 + kill);
        until(&file, &mut agent, moment);
        std::thread::sleep(Duration::from_micros(draw(100 + kill) % 9000));
        let all = ranks(&agent);
        assert_eq!(all.len(), 4);
        let (rank, victim) = all[draw(200 + kill) as usize % 4];
        let killed = Instant::now();
        signal(victim, libc::SIGKILL);
        while all.iter().any(|(_, pid)| lives(*pid)) {
            assert!(killed.elapsed() < END, "kill {kill}: ranks outlive rank {rank} by 10 s");
            std::thread::sleep(Duration::from_millis(5));
        }
        longest = longest.max(killed.elapsed());
        let output = wait(agent);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        if rank > 0 {
            assert!(stderr.contains(&format!("rank {rank} (process {victim} on ")), "kill {kill}: {stderr}");
        }
    }
    println!("the last rank ended at most {longest:?} after a kill");
    let stderr = done(by(&file, 2));
    assert!(stderr.contains(&format!("resuming killed/1 at step {}", newest_checkpoint_before(&stderr))), "{stderr}");
    assert_eq!(evaluations(&file), evaluations(&alone), "the way there is an uninterrupted run's");
    assert_eq!(weights(&file), weights(&alone), "and so are the weights: every example was seen, and in its step");
}

/// The step that a run says it resumes at.
fn newest_checkpoint_before(stderr: &str) -> u64 {
    let said = stderr.split("at step ").nth(1).and_then(|rest| rest.split_whitespace().next());
    said.and_then(|step| step.parse().ok()).filter(|step| *step > 0).unwrap_or_else(|| panic!("{stderr}"))
}

#[test]
fn a_stopped_rank_is_named_and_ended() {
    let (_folder, file) = folder();
    let mut agent = start(by(&file, 4));
    until(&file, &mut agent, 5);
    let all = ranks(&agent);
    let (_, victim) = *all.iter().find(|(rank, _)| *rank == 1).unwrap();
    let stopped = Instant::now();
    signal(victim, libc::SIGSTOP);
    while all.iter().any(|(rank, pid)| *rank != 1 && lives(*pid)) {
        assert!(stopped.elapsed() < END, "ranks outlive a stopped one by 10 s");
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = wait(agent);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains(&format!("rank 1 (process {victim} on ")) && stderr.contains("is lost: silent for"),
        "{stderr}"
    );
    assert!(!lives(victim));
}

#[test]
fn no_rank_outlives_its_agent() {
    let (_folder, file) = folder();
    let mut agent = start(by(&file, 2));
    until(&file, &mut agent, 3);
    let all = ranks(&agent);
    agent.kill().unwrap();
    let killed = Instant::now();
    while all.iter().any(|(_, pid)| lives(*pid)) {
        assert!(killed.elapsed() < END);
        std::thread::sleep(Duration::from_millis(5));
    }
    wait(agent);
}

#[test]
fn a_signal_reaches_all_ranks_and_the_run_goes_on_with_others() {
    let (_alone, alone) = folder();
    done(by(&alone, 1));
    let (_folder, file) = folder();
    let mut agent = start(by(&file, 4));
    until(&file, &mut agent, 20);
    signal(agent.id() as i32, libc::SIGTERM);
    let output = wait(agent);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "{stderr}");
    let step = newest_checkpoint(&file).unwrap();
    assert!(step >= 20 && stderr.contains(&format!("SIGTERM: checkpoint of step {step} written")), "{stderr}");
    assert_eq!(stderr.matches("SIGTERM").count(), 1, "only the main process speaks: {stderr}");
    assert!(done(by(&file, 1)).contains(&format!("resuming killed/1 at step {step}")));
    assert_eq!(weights(&file), weights(&alone));
}

#[test]
fn two_machines_that_share_no_files() {
    let (_alone, alone) = folder();
    done(by(&alone, 1));
    let (_folder, file) = folder();
    let (_elsewhere, elsewhere) = folder();
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port().to_string();
    let node = |file: &Path, node_rank: &str| {
        let mut command = by(file, 2);
        command.args(["--nnodes", "2", "--node-rank", node_rank, "--master-addr", "127.0.0.1", "--master-port", &port]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let second = node(&elsewhere, "1");
    let first = wait(node(&file, "0"));
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let second = wait(second);
    assert!(second.status.success() && second.stdout.is_empty() && second.stderr.is_empty(), "{second:?}");
    assert_eq!(weights(&file), weights(&alone));
    assert!(!elsewhere.with_file_name("runs/killed/runs").exists(), "only the main process writes a run");
}

#[test]
fn launchers_variables_make_ranks() {
    let (_alone, alone) = folder();
    done(by(&alone, 1));
    let (_folder, file) = folder();
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port().to_string();
    let rank = |rank: &str| {
        let mut command = by(&file, 2);
        command.envs([("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")]);
        command.envs([("MASTER_ADDR", "localhost"), ("MASTER_PORT", &port)]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let (other, main) = (rank("1"), wait(rank("0")));
    assert!(main.status.success(), "{}", String::from_utf8_lossy(&main.stderr));
    let other = wait(other);
    assert!(other.status.success() && other.stdout.is_empty() && other.stderr.is_empty(), "{other:?}");
    assert_eq!(weights(&file), weights(&alone));
}

#[test]
fn what_cannot_be_is_said_once() {
    let (_folder, file) = folder();
    let fails = |processes: usize, sets: &[&str]| {
        let mut command = by(&file, processes);
        for set in sets {
            command.args(["--set", set]);
        }
        let output = wait(start(command));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        stderr
    };
    let stderr = fails(3, &[]);
    let message = "error: train.deterministic = true takes a world size of 1, 2, 4, 8; this one is of 3";
    assert_eq!(stderr.matches(message).count(), 1, "{stderr}");
    let stderr = fails(2, &["train.freeze=[\"nothing\"]"]);
    assert_eq!(stderr.matches("no parameter's name begins with \"nothing\"").count(), 1, "{stderr}");
    let mut command = by(&file, 4);
    command.envs([("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")]);
    let output = wait(start(command));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "error: --nproc-per-node 4: a launcher has started 2 processes on this machine; leave the option out\n"
    );
    let stderr = fails(2, &["train.epochs=0"]);
    assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
}
