//! Which examples make which step, as a pure function of (seed, step): nothing to save but the step.
//!
//! A global batch is what a plain shuffle of the epoch gives, so lengths cost no accuracy. Lengths
//! only decide how the batch is cut into micro-batches: packed sequences have no padding to save, but
//! micro-batches of equal token count need equal time and memory.

use sha2::{Digest, Sha256};

/// The chunks that a global batch is cut into where sums are to have the same bits on any number of
/// processes that divides them.
pub const CHUNKS: usize = 8;

/// Which part of each global batch a process computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The process, from 0.
    pub rank: usize,
    /// How many there are.
    pub world_size: usize,
    /// Whether the batch is cut into [`CHUNKS`], however many processes there are.
    pub deterministic: bool,
}

impl Share {
    /// All of it.
    pub const ALL: Self = Self { rank: 0, world_size: 1, deterministic: false };
}

/// Cuts epochs into global batches, those into shares, and those into micro-batches.
#[derive(Clone, Debug)]
pub struct Sampler {
    lengths: Vec<u32>,
    seed: u64,
    batch_size: usize,
    micro_batch_tokens: usize,
    accumulation: usize,
    epoch: Option<(u64, Vec<u32>)>,
}

impl Sampler {
    /// A sampler over examples of these `lengths` (tokens). `accumulation` is the least number of
    /// micro-batches a step.
    pub fn new(
        lengths: Vec<u32>,
        seed: u64,
        batch_size: usize,
        micro_batch_tokens: usize,
        accumulation: usize,
    ) -> Self {
        Self { lengths, seed, batch_size, micro_batch_tokens, accumulation, epoch: None }
    }

    /// Micro-batches have at most so many tokens from now on.
    pub fn set_micro_batch_tokens(&mut self, tokens: usize) {
        self.micro_batch_tokens = tokens;
    }

    /// The micro-batch of most tokens that falls to one process in some steps.
    pub fn largest(&mut self, steps: std::ops::Range<u64>, share: Share) -> Vec<u32> {
        let batches = steps.flat_map(|step| self.micro_batches(step, share).concat()).collect::<Vec<_>>();
        let tokens = |batch: &Vec<u32>| batch.iter().map(|&i| self.lengths[i as usize]).sum::<u32>();
        batches.into_iter().max_by_key(tokens).unwrap_or_default()
    }

    /// Optimizer steps an epoch; the last batch of an epoch may be smaller.
    pub fn steps_per_epoch(&self) -> u64 {
        self.lengths.len().div_ceil(self.batch_size) as u64
    }

    /// The examples of an optimizer step (from 0).
    pub fn batch(&mut self, step: u64) -> Vec<u32> {
        let (epoch, within) = (step / self.steps_per_epoch(), (step % self.steps_per_epoch()) as usize);
        if self.epoch.as_ref().is_none_or(|(cached, _)| *cached != epoch) {
            self.epoch = Some((epoch, permutation(self.lengths.len(), self.seed, epoch)));
        }
        let order = self.epoch.as_ref().map_or(&[][..], |(_, order)| order);
        order.chunks(self.batch_size).nth(within).unwrap_or(&[]).to_vec()
    }

    /// The examples of an optimizer step that fall to one process, as sums that are made one by one, each
    /// of micro-batches: one sum, or the process's part of [`CHUNKS`]. Processes get about equally many
    /// tokens; where there are fewer examples than processes some have no micro-batch.
    pub fn micro_batches(&mut self, step: u64, share: Share) -> Vec<Vec<Vec<u32>>> {
        let sums = if share.deterministic { CHUNKS } else { share.world_size };
        let each = sums / share.world_size;
        let batch = self.batch(step);
        let shares = divide(&batch, &self.lengths, sums);
        let mine = shares.into_iter().skip(share.rank * each).take(each);
        let at_least = self.accumulation.div_ceil(each.max(1));
        mine.map(|examples| cut(&examples, &self.lengths, self.micro_batch_tokens, at_least)).collect()
    }
}

/// A shuffle of `0..n` that depends on its arguments alone: in the order of a keyed hash.
fn permutation(n: usize, seed: u64, epoch: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n as u32).collect();
    order.sort_by_cached_key(|i| {
        let draw = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(epoch.to_le_bytes());
        (draw.chain_update(i.to_le_bytes()).finalize(), *i)
    });
    order
}

/// All examples of a part in batches of at most `tokens` tokens (an example longer than that stands
/// alone), sorted by length: a pass without gradients needs no more.
pub fn sorted_batches(lengths: &[usize], tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut load = 0;
    for i in order {
        load += lengths[i];
        match batches.last_mut() {
            Some(batch) if load <= tokens => batch.push(i),
            _ => {
                batches.push(vec![i]);
                load = lengths[i];
            }
        }
    }
    batches
}

/// Divides `batch` into `count` parts of about equally many tokens, longest first to the emptiest
/// (Graham, 1969).
fn divide(batch: &[u32], lengths: &[u32], count: usize) -> Vec<Vec<u32>> {
    let length = |&i: &u32| lengths[i as usize] as usize;
    let mut longest_first = batch.to_vec();
    longest_first.sort_by_key(|i| (std::cmp::Reverse(length(i)), *i));
    let mut parts = vec![(0usize, Vec::new()); count];
    for i in longest_first {
        if let Some(part) = parts.iter_mut().min_by_key(|(load, _)| *load) {
            part.0 += length(&i);
            part.1.push(i);
        }
    }
    parts.into_iter().map(|(_, examples)| examples).collect()
}

/// Cuts `batch` into the fewest micro-batches, at least `at_least`, of at most `tokens` tokens each (an
/// example longer than that stands alone).
pub fn cut(batch: &[u32], lengths: &[u32], tokens: usize, at_least: usize) -> Vec<Vec<u32>> {
    let load = |batch: &[u32]| batch.iter().map(|&i| lengths[i as usize] as usize).sum::<usize>();
    let mut count = at_least.max(load(batch).div_ceil(tokens.max(1))).clamp(1, batch.len().max(1));
    loop {
        let parts = divide(batch, lengths, count);
        if count >= batch.len() || parts.iter().all(|part| load(part) <= tokens || part.len() == 1) {
            return parts.into_iter().filter(|part| !part.is_empty()).collect();
        }
        count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_epoch_shows_every_example_once(n in 1usize..200, batch in 1usize..40, tokens in 1usize..300, at_least in 1usize..5, log in 0u32..4, deterministic: bool) {
            let world_size = 2usize.pow(log);
            let lengths: Vec<u32> = (0..n as u32).map(|i| 1 + i * 7 % 90).collect();
            let mut sampler = Sampler::new(lengths.clone(), 3, batch, tokens, at_least);
            let mut seen = Vec::new();
            for step in 0..sampler.steps_per_epoch() {
                for rank in 0..world_size {
                    for micro in sampler.micro_batches(step, Share { rank, world_size, deterministic }).concat() {
                        let load: u32 = micro.iter().map(|&i| lengths[i as usize]).sum();
                        prop_assert!(load as usize <= tokens || micro.len() == 1);
                        seen.extend(micro);
                    }
                }
            }
            seen.sort();
            prop_assert_eq!(seen, (0..n as u32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn sorted_batches_hold_every_example_once() {
        let lengths: Vec<usize> = (0..50).map(|i| 1 + i * 37 % 90).collect();
        let batches = sorted_batches(&lengths, 100);
        let load = |batch: &[usize]| batch.iter().map(|&i| lengths[i]).sum::<usize>();
        assert!(batches.iter().all(|batch| load(batch) <= 100));
        let mut seen = batches.concat();
        assert!(seen.is_sorted_by_key(|&i| std::cmp::Reverse(lengths[i])));
        seen.sort();
        assert_eq!(seen, (0..50).collect::<Vec<_>>());
        assert_eq!(sorted_batches(&[7, 300, 5], 10), [vec![1], vec![0], vec![2]]);
    }

    #[test]
    fn the_batch_depends_on_seed_and_step_alone() {
        let sampler = |tokens| Sampler::new((1..100).collect(), 7, 16, tokens, 1);
        let batch = |mut s: Sampler, step| {
            let mut batch = s.micro_batches(step, Share::ALL).concat().concat();
            batch.sort();
            batch
        };
        let (mut walked, fresh) = (sampler(64), sampler(64));
        for step in 0..20 {
            walked.batch(step);
        }
        assert_eq!(walked.batch(20), fresh.clone().batch(20));
        assert_eq!(batch(sampler(64), 9), batch(sampler(4096), 9), "the token budget moves no example");
        assert_ne!(batch(fresh.clone(), 0), batch(fresh, 7), "epochs are shuffled anew");
    }

    #[test]
    fn chunks_do_not_depend_on_the_processes() {
        let mut sampler = Sampler::new((1..100).map(|i| i * 7 % 50 + 1).collect(), 7, 16, 64, 1);
        let mut chunks = |world_size| {
            let share = |rank| Share { rank, world_size, deterministic: true };
            (0..world_size).flat_map(|rank| sampler.micro_batches(3, share(rank))).collect::<Vec<_>>()
        };
        let alone = chunks(1);
        assert_eq!(alone.len(), CHUNKS);
        for world_size in [2, 4, 8] {
            assert_eq!(chunks(world_size), alone);
        }
    }

    #[test]
    fn processes_get_about_equally_many_tokens() {
        let lengths: Vec<u32> = (0..640u32).map(|i| 1 + i * 37 % 256).collect();
        let mut sampler = Sampler::new(lengths.clone(), 1, 64, 4096, 1);
        for step in 0..10 {
            let mut load = |rank| {
                let share = Share { rank, world_size: 4, deterministic: false };
                let examples = sampler.micro_batches(step, share).concat().concat();
                examples.iter().map(|&i| lengths[i as usize]).sum::<u32>()
            };
            let loads: Vec<u32> = (0..4).map(&mut load).collect();
            let [least, most] = [loads.iter().min(), loads.iter().max()].map(|load| *load.unwrap());
            assert!(most - least <= most / 20, "{loads:?}");
        }
    }
}
