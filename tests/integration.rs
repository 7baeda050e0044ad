//! The one integration binary: a module for each concern.

mod parity;
mod resume;
mod support;
