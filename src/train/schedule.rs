//! Learning-rate schedules, as transformers defines them (`optimization.py`).

use crate::config;

/// A factor of the peak learning rate for each optimizer step.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    kind: config::Schedule,
    warmup: u64,
    total: u64,
}

impl Schedule {
    /// A schedule over `total` steps. A warm-up given as a ratio is rounded up to whole steps.
    pub fn new(kind: config::Schedule, warmup: config::Warmup, total: u64) -> Self {
        let warmup = match warmup {
            config::Warmup::Ratio(ratio) => (total as f64 * ratio).ceil() as u64,
            config::Warmup::Steps(steps) => steps,
        };
        Self { kind, warmup, total }
    }

    /// The factor of optimizer step `step`, from 0.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let progress = (step - self.warmup) as f64 / self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.kind {
            config::Schedule::Constant => 1.0,
            config::Schedule::Linear => (1.0 - progress).max(0.0),
            config::Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Schedule as Kind, Warmup};

    #[test]
    fn schedules_are_those_of_transformers() {
        // get_linear_schedule_with_warmup and get_cosine_schedule_with_warmup, 10 steps, 4 of warm-up.
        let factors =
            |kind| (0..10).map(|step| Schedule::new(kind, Warmup::Steps(4), 10).factor(step)).collect::<Vec<_>>();
        let warmup = [0.0, 0.25, 0.5, 0.75];
        let after = |f: fn(f64) -> f64| (0..6).map(move |i| f(f64::from(i) / 6.0));
        let expected = |f| warmup.into_iter().chain(after(f)).collect::<Vec<_>>();
        assert_eq!(factors(Kind::Linear), expected(|p| 1.0 - p));
        assert_eq!(factors(Kind::Cosine), expected(|p| 0.5 * (1.0 + (std::f64::consts::PI * p).cos())));
        assert_eq!(factors(Kind::Constant), expected(|_| 1.0));
        assert_eq!(Schedule::new(Kind::Linear, Warmup::Ratio(0.1), 25).factor(3), 1.0, "2.5 steps of warm-up are 3");
    }
}
