//! The one integration binary: a module for each concern.

mod data;
mod parity;
mod pipeline;
mod resume;
mod support;
