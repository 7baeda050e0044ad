//! Initial weights.
use crate::random;

/// `len` numbers of the normal distribution with mean 0 and standard deviation `std`: always the
/// same ones for a seed and a stream (one stream for each parameter).
pub fn normal(seed: u64, stream: u64, len: usize, std: f64) -> Vec<f32> {
    let key = random::key(&[seed, stream]);
    let mut values = Vec::with_capacity(len + 1);
    for pair in 0..len.div_ceil(2) as u64 {
        // Box and Muller 1958: 53-bit uniforms, the first never 0
        let unit = |counter: u64| ((random::mix(key.wrapping_add(counter)) >> 11) as f64 + 0.5) / 2f64.powi(53);
        let radius = std * (-2.0 * unit(2 * pair).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * unit(2 * pair + 1)).sin_cos();
        values.extend([(radius * cos) as f32, (radius * sin) as f32]);
    }
    values.truncate(len);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_normal_and_reproducible() {
        let x = normal(42, 7, 100_001, 0.02);
        assert_eq!(x.len(), 100_001);
        assert_eq!(x[..10], normal(42, 7, 10, 0.02));
        assert_ne!(x[..10], normal(42, 8, 10, 0.02));
        assert_ne!(x[..10], normal(43, 7, 10, 0.02));
        let moment = |p: i32| x.iter().map(|&x| (f64::from(x) / 0.02).powi(p)).sum::<f64>() / x.len() as f64;
        // five standard errors of each moment
        assert!(moment(1).abs() < 5.0 / 316.0, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 5.0 * 2f64.sqrt() / 316.0, "variance {}", moment(2));
        assert!(moment(3).abs() < 5.0 * 15f64.sqrt() / 316.0, "skewness {}", moment(3));
        assert!((moment(4) - 3.0).abs() < 5.0 * 96f64.sqrt() / 316.0, "kurtosis {}", moment(4));
    }
}
