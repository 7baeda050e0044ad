//! Bad input through every door, by the real binary: an error that names what and where, the right exit
//! code, and nothing else. No panic, no file half written, no hang, no memory to speak of.

#![cfg(target_os = "linux")] // memory is read from /proc

mod cases;
mod disk;
mod doors;
mod held;
mod parsers;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant, SystemTime};

use crate::support::kiln;

/// What a case is given to end.
const END: Duration = Duration::from_secs(30);

/// The most that a case may have resident, in kB. A run that nothing is wrong with takes a tenth.
const MEMORY: u64 = 500_000;

/// A folder in which nothing is wrong: an experiment, its rows, the model that it starts from, and a finished
/// run of two models; and first.toml, which made that model, with its run under first/.
static WHOLE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let rows: String = (0..120)
        .map(|i| format!("{i},\"row {i} of {}, {}\",label {}\n", WORDS[i % 7], WORDS[i * 31 % 7], i % 3))
        .collect();
    fs::write(folder.path().join("rows.csv"), format!("id,text,label\n{rows}")).unwrap();
    let toml = |models: &str| {
        format!(
            "name = \"hostile\"\nroot = \"kiln-runs\"\n[data]\nsource = \"rows.csv\"\nmax_length = 16\n{models}[train]\n\
             max_steps = 2\nbatch_size = 8\nlearning_rate = 1e-3\neval_steps = 2\nsave_steps = 1\nthreads = 1\n\
             [infer]\nworkers = 1\n"
        )
    };
    let scratch = "[[model]]\nname = \"base\"\narchitecture = \"bert\"\ntokenizer = { vocab_size = 200 }\nconfig = { \
                   hidden_size = 16, num_hidden_layers = 1, num_attention_heads = 2, intermediate_size = 16, \
                   max_position_embeddings = 16 }\n";
    let train = |models: &str, options: &[&str]| {
        fs::write(folder.path().join("experiment.toml"), toml(models)).unwrap();
        let output = command(folder.path(), &["train", "experiment.toml"]).args(options).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    train(scratch, &["--stop-after", "train", "--root", "first"]);
    fs::rename(folder.path().join("first/hostile/runs/1/base/model"), folder.path().join("base")).unwrap();
    fs::rename(folder.path().join("experiment.toml"), folder.path().join("first.toml")).unwrap();
    train("[[model]]\nname = \"a\"\npath = \"base\"\n[[model]]\nname = \"b\"\npath = \"base\"\ntrain.seed = 7\n", &[]);
    folder
});

const WORDS: [&str; 7] = ["audit", "policy", "breach", "invoice", "tunnel", "cipher", "lease"];

/// kiln in `folder`, with these arguments.
fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = kiln();
    command.current_dir(folder).args(arguments).arg("--offline");
    command
}

/// A copy of [`WHOLE`], to be spoiled.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let whole = WHOLE.path().join(".");
    assert!(Command::new("cp").arg("-r").arg(whole).arg(folder.path()).status().unwrap().success());
    folder
}

/// Spoils a copy of [`WHOLE`] and gives the arguments that bump into it.
type Spoil = Box<dyn Fn(&Path) -> Vec<String> + Send + Sync>;

/// One bad input.
struct Case {
    name: String,
    spoil: Spoil,
    /// Exit codes, of which it is one: more only where flipped bits decide.
    codes: Vec<i32>,
    /// What stderr says, where it is an error.
    says: Vec<&'static str>,
}

/// What became of it.
struct Ended {
    code: Option<i32>,
    stderr: String,
    peak: u64,
}

#[test]
fn every_bad_input_is_an_error_that_says_where() {
    let cases = cases::all();
    assert!(cases.len() >= 60, "{}", cases.len());
    LazyLock::force(&WHOLE);
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let found = judge(case);
                    failures.lock().unwrap().extend(found);
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} of {} cases:\n\n{}", failures.len(), cases.len(), failures.join("\n\n"));
}

/// What is wrong with how kiln took a case.
fn judge(case: &Case) -> Option<String> {
    let folder = copy();
    let arguments = (case.spoil)(folder.path());
    let before = tree(folder.path());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = end(command(folder.path(), &arguments));
    let after = tree(folder.path());
    let mut wrong = Vec::new();
    let Ended { code, stderr, peak } = ended;
    match code {
        Some(code) if case.codes.contains(&code) => {}
        code => wrong.push(format!("ended with {code:?}, needs {:?}", case.codes)),
    }
    if stderr.contains("panicked") {
        wrong.push("it panicked".to_owned());
    }
    // The tokenizer keeps a hundred bytes for each byte of a text.
    if peak > if case.name.contains("a line of 10 MB") { 3 * MEMORY } else { MEMORY } {
        wrong.push(format!("it took {peak} kB"));
    }
    if code.is_some_and(|code| code != 0) {
        wrong.extend(case.says.iter().filter(|part| !stderr.contains(**part)).map(|part| format!("no {part:?}")));
        if !stderr.lines().any(|line| line.starts_with("error: ")) {
            wrong.push("no line begins with `error: `".to_owned());
        }
        wrong.extend(left(&before, &after));
    }
    if wrong.is_empty() {
        return None;
    }
    let shown: String = stderr.chars().take(2000).collect();
    Some(format!("{} (kiln {}): {}\n{shown}", case.name, arguments.join(" "), wrong.join("; ")))
}

/// Files that a failed command has left or changed, but for those that are whole: a snapshot and its
/// encodings, the record of a run that failed, and a test whose certificate was refused after it.
fn left(before: &BTreeMap<PathBuf, SystemTime>, after: &BTreeMap<PathBuf, SystemTime>) -> Vec<String> {
    let allowed = |path: &Path| {
        let text = path.to_string_lossy();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.components().any(|part| part.as_os_str().to_string_lossy().starts_with(".tmp-"));
        let record = ["run.json", "lock.json", "experiment.toml", ".lock", "metrics.jsonl"].contains(&&*name);
        !temporary && (text.contains("/data/") || text.contains("/test/") || record)
    };
    let changed = after.iter().filter(|(path, time)| before.get(*path) != Some(time) && !allowed(path));
    let gone = before.keys().filter(|path| !after.contains_key(*path) && !path.to_string_lossy().contains(".tmp-"));
    changed.map(|(path, _)| path).chain(gone).map(|path| format!("left or changed {}", path.display())).collect()
}

/// The files below a folder with the time of their last change.
fn tree(folder: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else {
                let modified = entry.metadata().unwrap().modified().unwrap();
                found.insert(entry.path().strip_prefix(folder).unwrap().to_owned(), modified);
            }
        }
    }
    found
}

/// Runs a command to its end, or kills it where that does not come.
fn end(mut command: Command) -> Ended {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut pipe = child.stderr.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let (started, mut peak, mut late) = (Instant::now(), 0, false);
    let status = loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let high = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
        peak = peak.max(high.and_then(|kilobytes| kilobytes.parse().ok()).unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > END || peak > 4 * MEMORY {
            late = started.elapsed() > END;
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let mut stderr = reader.join().unwrap();
    if late {
        stderr += &format!("\nit did not end within {END:?}");
    }
    Ended { code: status.code(), stderr, peak }
}
