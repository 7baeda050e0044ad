//! What the tests share.

use std::path::PathBuf;

/// A file that the repository holds.
pub fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// What experiments/fetch.sh brought, or `None` after saying aloud that the test is skipped.
pub fn fetched(name: &str) -> Option<PathBuf> {
    let path = repository("experiments/data").join(name);
    if !path.exists() {
        println!("skipped: {} is not there; run experiments/fetch.sh", path.display());
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
    let python = std::env::var_os("KILN_PYTHON").map(PathBuf::from);
    if python.is_none() {
        println!("skipped: KILN_PYTHON is not set; ci/python-env.sh prints it");
    }
    python
}
