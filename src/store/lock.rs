//! Who holds a run.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// A file that one process at a time holds, by the operating system's lock: it ends with the
/// process, however that ends. The file says who holds it.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// The content of a lock file.
#[derive(Serialize, Deserialize)]
struct Holder {
    pid: u32,
    host: String,
    /// Seconds since 1970.
    start: u64,
}

impl Lock {
    /// Takes the lock at `path`, or says at once who holds it.
    ///
    /// # Errors
    /// `what` is held by another process, which the error names; or the file system's.
    pub fn take(path: &Path, what: &str) -> Result<Self> {
        let mut file = open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                let _ = file.read_to_string(&mut text);
                let holder =
                    serde_json::from_str::<Holder>(&text).map_or_else(|_| "another process".into(), Holder::describe);
                return Err(crate::user_error!(
                    "{what} is held by {holder}; wait for it or end it, or start another run with --new"
                ));
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        let holder = Holder { pid: std::process::id(), host: host(), start: now() };
        let text = serde_json::to_vec(&holder)?;
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(&text))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { _file: file })
    }

    /// Waits for the lock at `path`.
    ///
    /// # Errors
    /// The file system's.
    pub fn wait(path: &Path) -> Result<Self> {
        let file = open(path)?;
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self { _file: file })
    }
}

impl Holder {
    fn describe(self) -> String {
        let age = Duration::from_secs(now().saturating_sub(self.start));
        format!("process {} on {} for {age:?}", self.pid, self.host)
    }
}

fn open(path: &Path) -> Result<File> {
    // Not truncated: until the lock is ours, what it says is another's.
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

/// This machine's name.
pub fn host() -> String {
    let mut name = [0u8; 256];
    // SAFETY: the buffer is ours, and one byte shorter than it is for the kernel, so it ends in 0.
    let result = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    let length = name.iter().position(|&byte| byte == 0).unwrap_or(0);
    if result == 0 { String::from_utf8_lossy(&name[..length]).into_owned() } else { "this host".into() }
}
