//! Which examples make which step, as a pure function of (seed, step): nothing to save but the step.
//!
//! A global batch is what a plain shuffle of the epoch gives, so lengths cost no accuracy. Lengths
//! only decide how the batch is cut into micro-batches: packed sequences have no padding to save, but
//! micro-batches of equal token count need equal time and memory.

use sha2::{Digest, Sha256};

/// Cuts epochs into global batches, and those into micro-batches.
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

    /// Optimizer steps an epoch; the last batch of an epoch may be smaller.
    pub fn steps_per_epoch(&self) -> u64 {
        self.lengths.len().div_ceil(self.batch_size) as u64
    }

    /// The examples of an optimizer step (from 0), cut into micro-batches.
    pub fn micro_batches(&mut self, step: u64) -> Vec<Vec<u32>> {
        let (epoch, within) = (step / self.steps_per_epoch(), (step % self.steps_per_epoch()) as usize);
        if self.epoch.as_ref().is_none_or(|(cached, _)| *cached != epoch) {
            self.epoch = Some((epoch, permutation(self.lengths.len(), self.seed, epoch)));
        }
        let order = self.epoch.as_ref().map_or(&[][..], |(_, order)| order);
        let batch = order.chunks(self.batch_size).nth(within).unwrap_or(&[]);
        cut(batch, &self.lengths, self.micro_batch_tokens, self.accumulation)
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

/// Cuts `batch` into the fewest micro-batches, at least `at_least`, of at most `tokens` tokens each
/// (an example longer than that stands alone), longest first to the emptiest (Graham, 1969).
pub fn cut(batch: &[u32], lengths: &[u32], tokens: usize, at_least: usize) -> Vec<Vec<u32>> {
    let length = |&i: &u32| lengths[i as usize] as usize;
    let mut longest_first = batch.to_vec();
    longest_first.sort_by_key(|i| (std::cmp::Reverse(length(i)), *i));
    let total: usize = batch.iter().map(length).sum();
    let mut count = at_least.max(total.div_ceil(tokens.max(1))).clamp(1, batch.len().max(1));
    loop {
        let mut bins = vec![(0usize, Vec::new()); count];
        for i in &longest_first {
            if let Some(bin) = bins.iter_mut().min_by_key(|(load, _)| *load) {
                bin.0 += length(i);
                bin.1.push(*i);
            }
        }
        let fits = bins.iter().all(|(load, examples)| *load <= tokens || examples.len() == 1);
        if fits || count >= batch.len() {
            return bins.into_iter().map(|(_, examples)| examples).filter(|examples| !examples.is_empty()).collect();
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
        fn an_epoch_shows_every_example_once(n in 1usize..200, batch in 1usize..40, tokens in 1usize..300, at_least in 1usize..5) {
            let lengths: Vec<u32> = (0..n as u32).map(|i| 1 + i * 7 % 90).collect();
            let mut sampler = Sampler::new(lengths.clone(), 3, batch, tokens, at_least);
            let mut seen = Vec::new();
            for step in 0..sampler.steps_per_epoch() {
                for micro in sampler.micro_batches(step) {
                    let load: u32 = micro.iter().map(|&i| lengths[i as usize]).sum();
                    prop_assert!(load as usize <= tokens || micro.len() == 1);
                    seen.extend(micro);
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
            let mut batch = s.micro_batches(step).concat();
            batch.sort();
            batch
        };
        let (mut walked, fresh) = (sampler(64), sampler(64));
        for step in 0..20 {
            walked.micro_batches(step);
        }
        assert_eq!(walked.micro_batches(20), fresh.clone().micro_batches(20));
        assert_eq!(batch(sampler(64), 9), batch(sampler(4096), 9), "the token budget moves no example");
        assert_ne!(batch(fresh.clone(), 0), batch(fresh, 7), "epochs are shuffled anew");
    }
}
