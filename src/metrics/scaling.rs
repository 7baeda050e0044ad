//! How fast many processes train together: medians of what was timed, and what they come to.

use serde::{Deserialize, Serialize};

/// What was timed of one world.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Processes.
    pub world_size: usize,
    /// What they compute on: `cpu`, `cuda`.
    pub device: String,
    /// CPU threads of each.
    pub threads: usize,
    /// How much computes: devices, or on CPUs threads, no more than there are cores.
    pub units: usize,
    /// Examples of an optimizer step, on all processes together.
    pub batch_size: usize,
    /// Floating-point operations a second in large products, on all processes at once.
    pub peak_flops: f64,
    /// The optimizer steps.
    pub steps: Vec<Step>,
    /// When a process can begin to communicate.
    pub profile: Option<Profile>,
}

/// One optimizer step on all processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Tokens in it.
    pub tokens: u64,
    /// Examples in it.
    pub sequences: u64,
    /// Operations of its matrix products, forward and backward, what is computed again not counted twice.
    pub flops: u64,
    /// Seconds, on the process that took longest.
    pub seconds: f64,
    /// Seconds that the process group worked or waited for other ranks, beside the computing or not: the
    /// processes' mean.
    pub communication: f64,
    /// Seconds that the computing waited for the process group: the processes' mean.
    pub waiting: f64,
}

/// A step's course on one process: medians over steps, in seconds from its start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// The buckets of gradients, in the order in which they are summed.
    pub buckets: Vec<Bucket>,
    /// When the last backward has ended.
    pub backward_end: f64,
    /// The whole step.
    pub step: f64,
}

/// Gradients that are summed at once.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// Their size.
    pub bytes: u64,
    /// When they are complete.
    pub complete: f64,
}

/// What a world's steps come to: medians.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Examples a second.
    pub sequences_per_second: f64,
    /// Floating-point operations of the model a second.
    pub flops: f64,
    /// Their share of the peak (PaLM's model FLOPs utilisation).
    pub utilisation: f64,
    /// Tokens a second for each unit of what computes, by those of the first world.
    pub efficiency: f64,
    /// Seconds of a step.
    pub step: f64,
    /// Seconds of it in which the computing does not wait.
    pub compute: f64,
    /// As [`Step::communication`]; what it has more than `waiting` is hidden behind the computing.
    pub communication: f64,
    /// As [`Step::waiting`].
    pub waiting: f64,
}

impl Measured {
    /// Takes in another measurement of the same world.
    pub fn merge(&mut self, other: Self) {
        self.peak_flops = self.peak_flops.max(other.peak_flops);
        self.steps.extend(other.steps);
        if let (Some(mine), Some(other)) = (&self.profile, other.profile)
            && other.step < mine.step
        {
            self.profile = Some(other); // the one that was disturbed less
        }
    }

    /// The figures, beside those of the `first` world.
    pub fn figures(&self, first: &Self) -> Figures {
        let of = |world: &Self, value: fn(&Step) -> f64| median(world.steps.iter().map(value));
        let rate = |world: &Self| of(world, |step| step.tokens as f64 / step.seconds);
        let flops = of(self, |step| step.flops as f64 / step.seconds);
        let [step, waiting] = [of(self, |step| step.seconds), of(self, |step| step.waiting)];
        Figures {
            tokens_per_second: rate(self),
            sequences_per_second: of(self, |step| step.sequences as f64 / step.seconds),
            flops,
            utilisation: flops / self.peak_flops,
            efficiency: rate(self) / self.units as f64 / (rate(first) / first.units as f64),
            step,
            compute: step - waiting,
            communication: of(self, |step| step.communication),
            waiting,
        }
    }
}

impl Step {
    /// A step on all processes from what each has timed of its part.
    pub fn of_all(parts: &[Self]) -> Self {
        let mean = |value: fn(&Self) -> f64| parts.iter().map(value).sum::<f64>() / parts.len() as f64;
        Self {
            tokens: parts.iter().map(|part| part.tokens).sum(),
            sequences: parts.iter().map(|part| part.sequences).sum(),
            flops: parts.iter().map(|part| part.flops).sum(),
            seconds: parts.iter().map(|part| part.seconds).fold(0.0, f64::max),
            communication: mean(|part| part.communication),
            waiting: mean(|part| part.waiting),
        }
    }
}

impl Profile {
    /// The medians of single steps' courses, which have the same buckets.
    pub fn of_steps(steps: &[Self]) -> Option<Self> {
        let bucket = |(i, bucket): (usize, &Bucket)| Bucket {
            complete: median(steps.iter().filter_map(|step| Some(step.buckets.get(i)?.complete))),
            ..*bucket
        };
        Some(Self {
            buckets: steps.first()?.buckets.iter().enumerate().map(bucket).collect(),
            backward_end: median(steps.iter().map(|step| step.backward_end)),
            step: median(steps.iter().map(|step| step.step)),
        })
    }
}

/// The middle of `values`, the mean of both where there are two; NaN of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    let half = values.len() / 2;
    if values.len().is_multiple_of(2) { (at(half.wrapping_sub(1)) + at(half)) / 2.0 } else { at(half) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(world_size: usize, units: usize, seconds: &[f64]) -> Measured {
        let part = |seconds| Step {
            tokens: 100,
            sequences: 2,
            flops: 50,
            seconds,
            communication: 0.25 * seconds,
            waiting: 0.125 * seconds,
        };
        let steps = seconds.iter().map(|&seconds| Step::of_all(&vec![part(seconds); world_size])).collect();
        Measured {
            world_size,
            device: "cpu".into(),
            threads: 1,
            units,
            batch_size: 2,
            peak_flops: 200.0,
            steps,
            profile: None,
        }
    }

    #[test]
    fn efficiency_is_by_what_computes() {
        let (one, two) = (world(1, 1, &[2.0, 1.0, 9.0]), world(2, 2, &[2.5, 2.5]));
        let [first, second] = [&one, &two].map(|world| world.figures(&one));
        assert_eq!((first.tokens_per_second, first.efficiency, first.utilisation), (50.0, 1.0, 0.125));
        assert_eq!((second.tokens_per_second, second.sequences_per_second, second.efficiency), (80.0, 1.6, 0.8));
        assert_eq!((second.step, second.compute, second.communication, second.waiting), (2.5, 2.1875, 0.625, 0.3125));
        // As many threads in more processes: what they lose is the processes' cost.
        assert_eq!(world(2, 1, &[5.0]).figures(&one).efficiency, 0.8);
    }

    #[test]
    fn medians() {
        assert_eq!([median([3.0, 1.0, 2.0]), median([4.0, 1.0, 2.0, 3.0]), median([7.0])], [2.0, 2.5, 7.0]);
        assert!(median([]).is_nan());
        let profile = |complete| Profile { buckets: vec![Bucket { bytes: 8, complete }], backward_end: 2.0, step: 3.0 };
        let all = Profile::of_steps(&[profile(1.0), profile(1.5), profile(9.0)]).unwrap();
        assert_eq!(all, profile(1.5));
    }
}
