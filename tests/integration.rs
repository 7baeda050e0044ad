//! The one integration binary: a module for each concern.

mod data;
mod memory;
mod parity;
mod pipeline;
mod resume;
mod support;
