//! The threads that kernels share: one persistent pool.
use candle_core::{Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Arc, RwLock};

static POOL: RwLock<Option<Arc<ThreadPool>>> = RwLock::new(None);

/// Kernels run on `n` threads from now on. Until this is called they use rayon's own pool, one
/// thread for each core.
///
/// # Errors
/// Where `n` is 0 or the system gives no threads.
pub fn set(n: usize) -> Result<()> {
    if n == 0 {
        candle_core::bail!("threads = 0: kernels need one thread or more");
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(n)
        .thread_name(|i| format!("kernel-{i}"))
        .build()
        .map_err(|e| Error::msg(format!("starting {n} kernel threads: {e}")))?;
    *POOL.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Arc::new(pool));
    Ok(())
}

/// How many threads kernels run on.
pub fn get() -> usize {
    install(rayon::current_num_threads)
}

/// Runs `f` so that rayon's parallel iterators in it use the kernels' threads.
pub(crate) fn install<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let pool = POOL.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
    match pool {
        Some(pool) => pool.install(f),
        None => f(),
    }
}

/// How many of `items` each thread takes where all take about the same: at least `least`.
pub(crate) fn share(items: usize, least: usize) -> usize {
    items.div_ceil(rayon::current_num_threads()).max(least).max(1)
}
