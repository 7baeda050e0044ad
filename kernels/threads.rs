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

/// How many of `items` make a task, where all take about the same time: at least `least`. There are
/// some for each thread: one that the machine holds up leaves its last ones to the others.
pub(crate) fn share(items: usize, least: usize) -> usize {
    items.div_ceil(4 * rayon::current_num_threads()).max(least).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Device, Dropout, Grad, attention, layer_norm, linear, norm, testing::*};

    /// Most of the kernels one after another, and the bits that came out.
    fn run() -> Result<Vec<u32>> {
        let packing = packing(&[1, 130, 70, 99]);
        let dropout = Dropout { probability: 0.1, seed: 1, step: 2, site: 3 };
        let (rows, hidden) = (packing.tokens(), 128);
        let (x, w) = (tensor(1, &[rows, hidden]), buffer(1, hidden * hidden + 2 * hidden));
        let (gamma, beta) = (w.view(0..hidden), w.view(hidden..2 * hidden));
        let weight = w.view(2 * hidden..w.len());
        let mut gradients = Buffer::zeros(w.len(), &Device::Cpu)?;
        let [dgamma, dbeta, dw] = gradients.views_mut([0..hidden, hidden..2 * hidden, 2 * hidden..w.len()])?;

        let y = linear::forward(&x, weight, Some(beta))?;
        let (out, lse) = attention::forward(&y, &x, &y, &packing, 4, 0.2, Some(&dropout))?;
        let masked = Some((&dropout, &packing));
        let (z, saved) = layer_norm::forward(&out, Some(&x), masked, gamma, beta, 1e-12)?;
        let (dz, _) = layer_norm::backward(&saved, masked, z.copy()?, gamma, Some(dgamma), Some(dbeta), true)?;
        let (dq, dk, dv) = attention::backward(&y, &x, &y, &out, &lse, &dz, &packing, 4, 0.2, Some(&dropout))?;
        let dx = linear::backward(&x, &dq, weight, Grad::Into(dk), Some(dw), None)?;
        let norm = norm::global(&gradients, std::slice::from_ref(&(0..w.len())))?.to_bits();
        let mut bits = vec![norm as u32, (norm >> 32) as u32];
        for tensor in [z, dv, dx.unwrap()] {
            bits.extend(values(&tensor).iter().map(|x| x.to_bits()));
        }
        bits.extend(all(&gradients).iter().map(|x| x.to_bits()));
        Ok(bits)
    }

    /// Other tests may run meanwhile: what they compute does not depend on the threads either.
    #[test]
    fn results_do_not_depend_on_the_threads() -> Result<()> {
        let mut results = Vec::new();
        for n in [1, 2, 2, 3] {
            set(n)?;
            assert_eq!(get(), n);
            results.push(run()?);
        }
        assert!(results[1] == results[2], "the same number of threads gave other bits");
        assert!(results[0] == results[1] && results[0] == results[3], "another number of threads gave other bits");
        assert!(set(0).is_err());
        Ok(())
    }
}
