//! The one integration binary: a module for each concern.

mod architectures;
mod bench;
mod comparison;
mod data;
#[cfg(target_os = "linux")] // they look into /proc
mod distributed;
#[cfg(target_os = "linux")] // they look into /proc
mod hostile;
mod memory;
mod parity;
mod pipeline;
mod report;
mod resume;
mod support;
mod terminal;
mod trackers;
