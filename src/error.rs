//! Whose fault an error is, which decides the exit code, and the way to stderr.

use std::cell::Cell;
use std::fmt;
use std::io::Write as _;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// An error that the user can put right: a mistake in the experiment file, the data or the command
/// line. `kiln` ends with 2 where one stands anywhere in the chain, with 1 otherwise.
///
/// `return Err(user_error!("…"))` makes one from a message; `.map_err(UserError)` marks what an
/// `anyhow::Result` says.
#[derive(Debug)]
pub struct UserError(pub anyhow::Error);

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for UserError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// An `anyhow::Error` that is the user's to put right, from a format string.
#[macro_export]
macro_rules! user_error {
    ($($message:tt)+) => {
        ::anyhow::Error::new($crate::error::UserError(::anyhow::anyhow!($($message)+)))
    };
}

/// 2 where the user can put the error right, 1 otherwise.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(if error.chain().any(|cause| cause.is::<UserError>()) { 2 } else { 1 })
}

/// Whether warnings are kept back: `-q`, of the whole process.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Keeps back what [`warn()`] says from now on.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Writes what is neither a result nor an error to stderr, as a line, unless `-q` was given.
pub fn warn(line: impl fmt::Display) {
    if !QUIET.load(Ordering::Relaxed) {
        say(line);
    }
}

/// Writes a line to stderr. That nobody reads it any more is no error, least of all in mid-training.
pub fn say(line: impl fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// What `read` gives, or `None` where it panics, of which nothing is printed: for readers of others that take
/// a file for one that is whole.
pub fn guarded<T>(read: impl FnOnce() -> T) -> Option<T> {
    thread_local!(static GUARDED: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                print(panic);
            }
        }));
    });
    let before = GUARDED.replace(true);
    let read = panic::catch_unwind(AssertUnwindSafe(read));
    GUARDED.set(before);
    read.ok()
}
