//! SIGINT and SIGTERM: while the loop runs, the first asks for a checkpoint at the next step; the
//! second, and any at another time, ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Result;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Which signal has come, if any.
pub struct Signals {
    received: Arc<AtomicUsize>,
    at_once: Arc<AtomicBool>,
}

impl Signals {
    /// Makes ready to listen.
    ///
    /// # Errors
    /// What the system says of the handlers.
    pub fn listen() -> Result<Self> {
        let (received, at_once) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
        for signal in [SIGINT, SIGTERM] {
            // They run in this order: a signal that finds `at_once` unset sets it, and is noted.
            flag::register_conditional_default(signal, at_once.clone())?;
            flag::register(signal, at_once.clone())?;
            flag::register_usize(signal, received.clone(), signal as usize)?;
        }
        Ok(Self { received, at_once })
    }

    /// Runs `work`, which asks [`received`](Self::received) between its steps.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        self.at_once.store(false, Ordering::SeqCst);
        let result = work();
        self.at_once.store(true, Ordering::SeqCst);
        result
    }

    /// The signal that came.
    pub fn received(&self) -> Option<Signal> {
        Signal::new(self.received.load(Ordering::SeqCst) as i32)
    }
}

/// A signal that ends a training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// `SIGINT` or `SIGTERM`.
    pub name: &'static str,
    number: u8,
}

impl Signal {
    /// The signal of a number, if it is one that ends a training.
    pub fn new(number: i32) -> Option<Self> {
        match number {
            SIGINT => Some(Self { name: "SIGINT", number: SIGINT as u8 }),
            SIGTERM => Some(Self { name: "SIGTERM", number: SIGTERM as u8 }),
            _ => None,
        }
    }

    /// Its number.
    pub fn number(self) -> i32 {
        self.number.into()
    }

    /// 130 or 143, as shells have it.
    pub fn exit_code(self) -> u8 {
        128 + self.number
    }
}
