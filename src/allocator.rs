//! How the allocator treats what training frees.

use std::ffi::c_long;

use libmimalloc_sys::{mi_collect, mi_option_get, mi_option_set, mi_option_t};

/// `mi_option_purge_delay`, which the crate does not name: milliseconds until freed pages go back to
/// the system, -1 for never.
const PURGE_DELAY: mi_option_t = 15;

/// Freed pages stay with the process as long as this lives: each step allocates what the one before
/// freed, and pages that went back would come again as page faults, filled with zeros.
pub struct KeptPages {
    delay_before: c_long,
}

impl KeptPages {
    /// From now on.
    #[allow(clippy::new_without_default)] // it is an act, not a value
    pub fn new() -> Self {
        // SAFETY: the options are atomic words of the allocator.
        let delay_before = unsafe { mi_option_get(PURGE_DELAY) };
        unsafe { mi_option_set(PURGE_DELAY, -1) };
        Self { delay_before }
    }
}

impl Drop for KeptPages {
    fn drop(&mut self) {
        // SAFETY: as above; collecting gives back what this thread and the arenas hold free.
        unsafe {
            mi_option_set(PURGE_DELAY, self.delay_before);
            mi_collect(true);
        }
    }
}
