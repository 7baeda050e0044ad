//! What the tests share.

use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A file that the repository holds: where this was built, and on another machine in the current folder.
pub fn repository(path: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    if built.is_dir() { built.join(path) } else { path.into() }
}

/// What experiments/fetch.sh brought, or `None` after saying aloud that the test is skipped.
pub fn fetched(name: &str) -> Option<PathBuf> {
    let path = repository("experiments/data").join(name);
    if !path.exists() {
        skipped(&format!("{} is not there; run experiments/fetch.sh {name}", path.display()));
    }
    path.exists().then_some(path)
}

/// The real binary, without a terminal.
pub fn kiln() -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.stdin(std::process::Stdio::null());
    command
}

/// The Python of ci/python-env.sh, or `None` after saying aloud that the test is skipped.
pub fn python() -> Option<PathBuf> {
    named("KILN_PYTHON", "ci/python-env.sh")
}

/// The Python of `ci/python-env.sh trackers`, or `None` after saying aloud that the test is skipped.
pub fn trackers_python() -> Option<PathBuf> {
    named("KILN_TRACKERS_PYTHON", "ci/python-env.sh trackers")
}

fn named(variable: &str, script: &str) -> Option<PathBuf> {
    let python = std::env::var_os(variable).map(PathBuf::from);
    if python.is_none() {
        skipped(&format!("{variable} is not set; {script} prints it"));
    }
    python
}

/// Says so past the test runner, which keeps to itself what a passing test prints.
pub fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}
