//! What curves have in common, in a PNG and in a page: which values an axis shows, and how its ticks read.

/// From this many values on the training loss gets a smoothed line over a pale one.
pub const SMOOTH_FROM: usize = 60;

/// The points whose value is finite.
pub fn finite(mut points: Vec<(u64, f64)>) -> Vec<(u64, f64)> {
    points.retain(|(_, value)| value.is_finite());
    points
}

/// Each value's mean with its neighbours, 1/40 of all values on either side.
pub fn smoothed(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let half = points.len() / 40;
    (0..points.len())
        .map(|i| {
            let near = &points[i.saturating_sub(half)..points.len().min(i + half + 1)];
            let sum: f64 = near.iter().map(|(_, value)| value).sum();
            (points[i].0, sum / near.len() as f64)
        })
        .collect()
}

/// Losses from 0, unless they all lie far above it.
pub fn loss_axis(low: f64, high: f64) -> (f64, f64) {
    let pad = ((high - low) * 0.06).max(high.abs() * 0.02).max(1e-9);
    let from = if low >= 0.0 && low < high * 0.4 { 0.0 } else { low - pad };
    (from, high + pad)
}

/// Learning rates from 0.
pub fn rate_axis(_: f64, high: f64) -> (f64, f64) {
    (0.0, if high > 0.0 { high * 1.06 } else { 1.0 })
}

/// Scores lie between 0 and 1 and are worth looking at closely: at least 0.02 of it.
pub fn score_axis(low: f64, high: f64) -> (f64, f64) {
    let pad = ((high - low) * 0.08).max(0.01);
    ((low - pad).max(0.0), (high + pad).min(1.0 + pad / 4.0))
}

/// With the digits that an axis of this length needs.
pub fn decimal(value: f64, axis: f64) -> String {
    let digits = match axis {
        a if a > 1e5 => return scientific(value, axis),
        a if a > 5.0 => 0,
        a if a > 0.5 => 1,
        a if a > 0.05 => 2,
        a if a > 0.005 => 3,
        _ => return scientific(value, axis),
    };
    format!("{value:.digits$}")
}

/// `5e-5`, `2.5e-5`, `0`.
pub fn scientific(value: f64, axis: f64) -> String {
    if value.abs() < axis * 1e-6 {
        return String::from("0");
    }
    format!("{value:.2e}").replace(".00e", "e").replace("0e", "e")
}

/// `950`, `12k`, `12.5k`.
pub fn count(n: u64) -> String {
    if n < 10_000 { n.to_string() } else { format!("{}k", (n as f64 / 100.0).round() / 10.0) }
}

/// `1 step`, `2.5 epochs`.
pub fn counted(n: f64, unit: &str) -> String {
    format!("{} {unit}{}", short(n), if n == 1.0 { "" } else { "s" })
}

/// `2`, `0.52`.
pub fn short(n: f64) -> String {
    ((n * 100.0).round() / 100.0).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_read_as_people_write_them() {
        assert_eq!([0.0, 5e-5, 2.5e-5, 1e-10].map(|v| scientific(v, 5e-5)), ["0", "5e-5", "2.5e-5", "1e-10"]);
        assert_eq!([950, 12_000, 12_500].map(count), ["950", "12k", "12.5k"]);
        assert_eq!(decimal(0.875, 0.3), "0.88");
        assert_eq!([2.0, 0.523].map(short), ["2", "0.52"]);
    }

    #[test]
    fn smoothing_stays_in_place() {
        let line: Vec<_> = (0..200).map(|i| (i, f64::from(i as u32))).collect();
        let noise = |i| if i % 2 == 0 { 5.0 } else { -5.0 };
        let noisy: Vec<_> = line.iter().map(|&(i, v)| (i, v + noise(i))).collect();
        assert!(smoothed(&noisy).iter().zip(&line).all(|(got, want)| (got.1 - want.1).abs() < 4.0));
        assert!(smoothed(&noisy)[5..195].iter().zip(&line[5..]).all(|(got, want)| (got.1 - want.1).abs() < 0.5));
    }
}
