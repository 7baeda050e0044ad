//! What a step would take on many GPUs, by the course of a step on one: a simulation event by event, and
//! the closed form beside it.
//!
//! The measured [`Profile`] says when in a step each bucket of gradients is complete, when backward ends
//! and when the step does. In the simulation
//!
//! - every GPU has the profile's course, to the moment: weak scaling, no GPU slower than another, and no
//!   kernel slowed by the communication beside it;
//! - buckets go through one channel in order, each as soon as it is complete and the one before has gone;
//! - what comes after backward (the norm of the gradients, the optimizer) begins when the last bucket has
//!   gone, and after one more collective without payload, which gathers the losses;
//! - an all-reduce of `n` bytes over `W` GPUs takes `2(W − 1)/W · n / b + a`. `b` is the slowest link on
//!   the ring's way: that within a machine, or, if there is more than one, what a machine's network takes
//!   in each direction where that is less. `a` is a chain of hops within a machine and a tree between
//!   machines, there and back, as NCCL has for many machines (Jeaugey, 2019):
//!   `2(m − 1)·a_within + 2⌈log₂ M⌉·a_between` for `m` GPUs on each of `M` machines.
//!
//! The closed form knows the sums alone: all communication `C` can hide in what backward still does once
//! the first bucket is complete, except for the last bucket, whose end no computing covers:
//! `T + max(C_last, C − (t_backward − t_first))`. It is exact where the channel is never idle between the
//! first bucket and the last, or where the last bucket finds it idle; else it promises too much.

use serde::{Deserialize, Serialize};

use crate::metrics::scaling::Profile;

/// How GPUs are connected.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Links {
    /// GPUs of a machine.
    pub gpus_per_machine: usize,
    /// Bytes a second, in each direction, between GPUs of a machine.
    pub within: f64,
    /// Bytes a second, in each direction, between a machine and all others.
    pub between: f64,
    /// Seconds for a hop within a machine.
    pub latency_within: f64,
    /// Seconds for a hop between machines.
    pub latency_between: f64,
}

/// A step on many GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// GPUs.
    pub world_size: usize,
    /// Seconds of the step.
    pub step: f64,
    /// Seconds that the channel is in use.
    pub communication: f64,
    /// Seconds of it that no computing hides.
    pub exposed: f64,
    /// The profile's step by this one.
    pub efficiency: f64,
    /// The same by the closed form.
    pub closed_form: f64,
}

impl Links {
    /// Seconds of an all-reduce of `bytes` over `world_size` GPUs.
    pub fn all_reduce(&self, bytes: u64, world_size: usize) -> f64 {
        let machines = world_size.div_ceil(self.gpus_per_machine);
        let here = world_size.min(self.gpus_per_machine);
        let slowest = if machines > 1 { self.within.min(self.between) } else { self.within };
        let share = 2.0 * (world_size - 1) as f64 / world_size as f64;
        let hops = 2.0 * (here - 1) as f64 * self.latency_within;
        let tree = 2.0 * f64::from(machines.next_power_of_two().ilog2()) * self.latency_between;
        share * bytes as f64 / slowest + hops + tree
    }
}

impl Profile {
    /// A device that computes so many times as fast, in the same course.
    pub fn faster(&self, times: f64) -> Self {
        let mut faster = self.clone();
        faster.buckets.iter_mut().for_each(|bucket| bucket.complete /= times);
        faster.backward_end /= times;
        faster.step /= times;
        faster
    }
}

/// The step of `profile` on `world_size` GPUs, one at least, connected by `links`.
pub fn simulate(profile: &Profile, links: &Links, world_size: usize) -> Prediction {
    let sum = |bytes| links.all_reduce(bytes, world_size);
    let gather = sum(0);
    let (mut free, mut communication) = (0.0f64, gather);
    for bucket in &profile.buckets {
        let takes = sum(bucket.bytes);
        free = bucket.complete.max(free) + takes;
        communication += takes;
    }
    let exposed = (free - profile.backward_end).max(0.0) + gather;
    let step = profile.step + exposed;

    let first = profile.buckets.first().map_or(profile.backward_end, |bucket| bucket.complete);
    let last = profile.buckets.last().map_or(0.0, |bucket| sum(bucket.bytes));
    let unhidden = communication - gather - (profile.backward_end - first);
    let closed = profile.step + last.max(unhidden) + gather;
    let (efficiency, closed_form) = (profile.step / step, profile.step / closed);
    Prediction { world_size, step, communication, exposed, efficiency, closed_form }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::scaling::Bucket;

    /// 1 byte a second within a machine of 2, half of it between.
    const LINKS: Links =
        Links { gpus_per_machine: 2, within: 1.0, between: 0.5, latency_within: 0.0, latency_between: 0.0 };

    fn profile(buckets: &[(u64, f64)]) -> Profile {
        let bucket = |&(bytes, complete): &(u64, f64)| Bucket { bytes, complete };
        Profile { buckets: buckets.iter().map(bucket).collect(), backward_end: 10.0, step: 12.0 }
    }

    #[test]
    fn the_slowest_link_decides() {
        assert_eq!(LINKS.all_reduce(8, 1), 0.0);
        assert_eq!(LINKS.all_reduce(8, 2), 8.0);
        assert_eq!(LINKS.all_reduce(8, 4), 24.0);
        let slow = Links { latency_within: 1.0, latency_between: 10.0, ..LINKS };
        assert_eq!([1, 2, 4, 8].map(|gpus| slow.all_reduce(0, gpus)), [0.0, 2.0, 22.0, 42.0]);
    }

    #[test]
    fn one_gpu_is_the_profile() {
        let alone = simulate(&profile(&[(4, 3.0), (4, 10.0)]), &LINKS, 1);
        assert_eq!((alone.step, alone.exposed, alone.efficiency, alone.closed_form), (12.0, 0.0, 1.0, 1.0));
        let nothing = simulate(&profile(&[]), &LINKS, 4);
        assert_eq!((nothing.step, nothing.closed_form), (12.0, 1.0));
    }

    #[test]
    fn buckets_go_one_after_another() {
        // 3 … 5, 6 … 8, and 10 … 12: only the last is seen.
        let hidden = simulate(&profile(&[(2, 3.0), (2, 6.0), (2, 10.0)]), &LINKS, 2);
        assert_eq!((hidden.step, hidden.communication, hidden.exposed), (14.0, 6.0, 2.0));
        assert_eq!(hidden.closed_form, hidden.efficiency);
        // 3 … 7, 7 … 11, 11 … 15: the channel is never idle.
        let full = simulate(&profile(&[(4, 3.0), (4, 6.0), (4, 10.0)]), &LINKS, 2);
        assert_eq!((full.step, full.exposed, full.closed_form), (17.0, 5.0, full.efficiency));
        // 3 … 4, then idle; 9 … 13, 13 … 14: the closed form takes the idle time for hidden work.
        let idle = simulate(&profile(&[(1, 3.0), (4, 9.0), (1, 10.0)]), &LINKS, 2);
        assert_eq!((idle.step, idle.closed_form), (16.0, 12.0 / 13.0));
        // Slower links take more, more GPUs too.
        let steps = [2, 4, 8, 512].map(|gpus| simulate(&profile(&[(4, 3.0), (4, 10.0)]), &LINKS, gpus).step);
        assert!(steps.is_sorted() && steps[0] < steps[3], "{steps:?}");
    }

    #[test]
    fn a_faster_device_hides_less() {
        let profile = profile(&[(2, 3.0), (2, 10.0)]);
        let efficiency = |times| simulate(&profile.faster(times), &LINKS, 2).efficiency;
        assert_eq!(profile.faster(2.0).step, 6.0);
        assert!(efficiency(1.0) > efficiency(2.0) && efficiency(2.0) > efficiency(8.0));
    }
}
