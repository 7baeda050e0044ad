//! The one integration binary: a module for each concern.

mod architectures;
mod bench;
mod comparison;
mod data;
#[cfg(target_os = "linux")] // they look into /proc
mod distributed;
mod memory;
mod parity;
mod pipeline;
mod resume;
mod support;
mod terminal;
