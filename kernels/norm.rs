//! The Euclidean norm of all gradients.
use crate::device::on_gpu;
use crate::{Buffer, threads};
use candle_core::{Result, bail};
use rayon::prelude::*;
use std::ops::Range;

/// Elements that are summed in one go. The sum of such sums has the same bits on any number of
/// threads.
const CHUNK: usize = 16384;

/// `√Σ g²` over the ranges, summed in `f64`. A GPU is waited for.
///
/// # Errors
/// Where a range goes past the end.
pub fn global(gradients: &Buffer, ranges: &[Range<usize>]) -> Result<f64> {
    const KERNEL: &str = "norm::global";
    if let Some(range) = ranges.iter().find(|range| range.start > range.end || range.end > gradients.len()) {
        bail!("{KERNEL}: range {range:?} of a buffer of {}", gradients.len());
    }
    on_gpu!(gradients.device(), |gpu| {
        let sum = crate::gpu::norm::sum_of_squares(&*gpu, gradients, ranges)?;
        Ok(sum.to_vec1::<f64>()?.iter().sum::<f64>().sqrt())
    });
    let data = gradients.host(KERNEL, "gradients")?;
    let chunks: Vec<&[f32]> = ranges.iter().flat_map(|range| data[range.clone()].chunks(CHUNK)).collect();
    let mut sums = vec![0.0; chunks.len()];
    threads::install(|| {
        sums.par_iter_mut().zip(chunks).for_each(|(sum, chunk)| *sum = sum_of_squares(chunk));
    });
    Ok(sums.iter().sum::<f64>().sqrt())
}

crate::simd::vectorized! {
    fn sum_of_squares(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 16];
        let (whole, rest) = x.as_chunks::<16>();
        for x in whole {
            for lane in 0..16 {
                lanes[lane] += f64::from(x[lane]) * f64::from(x[lane]);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(x) * f64::from(x);
        }
        lanes.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn is_the_root_of_the_sum_of_squares() -> Result<()> {
        let gradients = buffer(1, 100_003);
        let ranges = [0..7, 20..50_001, 60_000..100_003];
        let want = ranges
            .iter()
            .flat_map(|r| gradients.read(r.clone()).unwrap())
            .map(|g| f64::from(g).powi(2))
            .sum::<f64>()
            .sqrt();
        let got = global(&gradients, &ranges)?;
        assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
        assert_eq!(global(&gradients, &[])?, 0.0);
        assert!(global(&gradients, &[0..7, 60_000..100_004]).is_err());
        Ok(())
    }
}
