//! The run layout.

mod file;

pub use file::{publish, read_json, remove_dir, stage, write, write_bytes, write_json};
