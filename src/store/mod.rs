//! Where everything lies: the run tree, files that appear whole, and who holds a run.
//!
//! ```text
//! <root>/<experiment>/data/<snapshot>/…                                       Experiment
//! <root>/<experiment>/runs/<run_num>/   experiment.toml lock.json run.json    RunDir
//!     <model>/                          checkpoints/ model/ model.onnx …      ModelDir
//! ```
//! A reader never sees a half-written file: [`write()`] and [`publish`] are the only ways in. What
//! starts with `.tmp-` was left by a process that was killed; opening a run removes what is in it.

mod comparison;
mod file;
mod layout;
mod lock;
mod open;
mod pins;

pub use file::{onnx_len, publish, read_json, remove_dir, stage, write, write_bytes, write_json};
pub use layout::{Experiment, JobType, ModelDir, RunDir, RunRecord, Status, experiments, find, find_model};
pub use lock::{Lock, host};
pub use open::{Choice, Opened, Run, exclusive};
pub use pins::{Pins, sha256_file};
