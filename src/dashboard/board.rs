//! What the dashboard knows of a training.

use crate::track::{Evaluation, Step};

/// Points of a curve that are kept at most: then every two become one.
const POINTS: usize = 2048;

/// What there is to draw.
#[derive(Clone, Default)]
pub struct Board {
    /// What is done, as `train minilm`.
    pub label: String,
    /// Steps in all.
    pub total: u64,
    /// The newest step.
    pub step: Option<Step>,
    /// The loss over the steps.
    pub loss: Curve,
    /// The evaluations, in order.
    pub evaluations: Vec<Evaluation>,
    /// Seconds that are left, where that can be said.
    pub seconds_left: Option<f64>,
    /// Bytes that the process has of the memory, and those that it may have.
    pub memory: (Option<u64>, Option<u64>),
    /// It ends with the next step, as was asked for.
    pub ending: bool,
    /// No colours.
    pub plain: bool,
}

/// A curve of bounded size: each point is the mean of equally many values.
#[derive(Clone)]
pub struct Curve {
    points: Vec<(f64, f64)>,
    /// Values of each point.
    each: usize,
    /// Values since the last point, and the sums of their places and heights.
    rest: (usize, f64, f64),
}

impl Default for Curve {
    fn default() -> Self {
        Self { points: Vec::new(), each: 1, rest: (0, 0.0, 0.0) }
    }
}

impl Curve {
    /// Adds a value; one that is not finite is left out.
    pub fn push(&mut self, x: f64, y: f64) {
        if !y.is_finite() {
            return;
        }
        let (count, xs, ys) = self.rest;
        self.rest = (count + 1, xs + x, ys + y);
        if self.rest.0 < self.each {
            return;
        }
        let (count, xs, ys) = std::mem::take(&mut self.rest);
        self.points.push((xs / count as f64, ys / count as f64));
        if self.points.len() == POINTS {
            let mean = |pair: &[(f64, f64)]| {
                let (x, y) = pair.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
                (x / pair.len() as f64, y / pair.len() as f64)
            };
            self.points = self.points.chunks(2).map(mean).collect();
            self.each *= 2;
        }
    }

    /// The points.
    pub fn points(&self) -> &[(f64, f64)] {
        &self.points
    }
}

/// Bytes that this process has of the machine's memory, where the system says so.
pub fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?;
    kilobytes.trim().parse::<u64>().ok().map(|kilobytes| 1024 * kilobytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_keeps_its_course_in_little_room() {
        let mut curve = Curve::default();
        curve.push(0.0, f64::NAN);
        assert!(curve.points().is_empty());
        (0..100_000).for_each(|i| curve.push(f64::from(i), f64::from(i) * 2.0));
        assert!(curve.points().len() < POINTS && curve.points().len() >= POINTS / 2 - 1);
        assert!(curve.points().iter().all(|(x, y)| (2.0 * x - y).abs() < 1e-6));
        assert!(curve.points().windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn a_process_knows_its_memory() {
        if cfg!(target_os = "linux") {
            assert!(resident().unwrap() > 1_000_000);
        }
    }
}
