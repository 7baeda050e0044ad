//! What a training needs in memory, before it starts: the model's own forward, read on the sizes of
//! the largest micro-batch.

use anyhow::{Context, Result};
use kiln_models::Built;
use kiln_models::nn::{Mode, Packing};
use serde::Serialize;

use crate::config::{self, Duration};
use crate::data::Dataset;
use crate::data::sampler::{self, Sampler, Share};

/// The process itself, its tokenizer, and what the allocator holds beyond what is in use: measured, 76
/// to 134 MB with vocabularies of up to 30,000 tokens (benches/results/2026-11-23-memory.md).
const REST: u64 = 95_000_000;

/// Epochs that are searched for the largest micro-batch.
pub(super) const EPOCHS: u64 = 10;

/// Bytes that a training's process holds, where they are most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// All together: what the system has to have.
    pub peak_bytes: u64,
    /// Weights, gradients and both moments.
    pub parameter_bytes: u64,
    /// Activations and their gradients in the largest micro-batch.
    pub step_bytes: u64,
    /// Activations in the largest batch of an evaluation, which come when the others are gone.
    pub evaluation_bytes: u64,
    /// The process itself, and what its allocator holds.
    pub rest_bytes: u64,
    /// Tokens of the largest micro-batch.
    pub tokens: usize,
    /// Whether the lengths are the data's; else all texts are taken for `max_length` tokens long.
    pub from_data: bool,
}

/// The lengths of the sequences that go through a model at once where they are most.
#[derive(Clone, Debug, PartialEq)]
pub struct Largest {
    /// In training.
    pub step: Vec<u32>,
    /// In an evaluation.
    pub evaluation: Vec<u32>,
    /// Whether they are the data's own.
    pub from_data: bool,
}

impl Largest {
    /// What the data's own lengths come to.
    pub fn of(train: &Dataset, validation: &Dataset, settings: &config::Train) -> Self {
        let lengths = |dataset: &Dataset| (0..dataset.len()).map(|i| dataset.length(i)).collect::<Vec<_>>();
        let (train, validation) = (lengths(train), lengths(validation));
        let mut sampler = Sampler::new(
            train.iter().map(|&length| length as u32).collect(),
            settings.seed,
            settings.batch_size,
            settings.micro_batch_tokens,
            settings.gradient_accumulation_steps,
        );
        // Every epoch is another shuffle; past some, none is likely to hold a larger batch.
        let most = EPOCHS * sampler.steps_per_epoch();
        let steps = match settings.duration {
            Duration::Epochs(epochs) => most.min(epochs.saturating_mul(sampler.steps_per_epoch())),
            Duration::Steps(steps) => most.min(steps),
        };
        let tokens = |lengths: &Vec<u32>| lengths.iter().sum::<u32>();
        let step = sampler.largest(0..steps, Share::ALL).iter().map(|&i| train[i as usize] as u32).collect();
        let batches = sampler::sorted_batches(&validation, settings.micro_batch_tokens).into_iter();
        let evaluation = batches.map(|batch| batch.iter().map(|&i| validation[i] as u32).collect()).max_by_key(tokens);
        Self { step, evaluation: evaluation.unwrap_or_default(), from_data: true }
    }

    /// What they are at most where no text is known: each has `max_length` tokens, up to the budget.
    pub fn assumed(max_length: usize, settings: &config::Train) -> Self {
        let budget = settings.micro_batch_tokens.max(max_length);
        let share = settings.batch_size.div_ceil(settings.gradient_accumulation_steps);
        let fill = |tokens: usize| {
            let rest = (tokens % max_length) as u32;
            let full = std::iter::repeat_n(max_length as u32, tokens / max_length);
            full.chain((rest > 0).then_some(rest)).collect()
        };
        Self { step: fill(budget.min(share.saturating_mul(max_length))), evaluation: fill(budget), from_data: false }
    }
}

impl Memory {
    /// What the training of `built`, whose parameters need no values, comes to with batches as `largest`.
    ///
    /// # Errors
    /// A batch of no sequence, or a model that no batch fits.
    pub fn plan(built: &Built, settings: &config::Train, largest: &Largest) -> Result<Self> {
        let bytes = |lengths: &[u32], mode: Mode| -> Result<u64> {
            if lengths.is_empty() {
                return Ok(0);
            }
            let offsets = std::iter::once(0).chain(lengths.iter().scan(0, |end, length| {
                *end += length;
                Some(*end)
            }));
            let packing = Packing::new(offsets.collect(), (0..lengths.len() as u64).collect())?;
            Ok(kiln_models::plan(built, packing, mode, settings.recompute)?.peak_bytes as u64)
        };
        let step_bytes =
            bytes(&largest.step, Mode::Train { seed: settings.seed, step: 0 }).context("a training step")?;
        let evaluation_bytes = bytes(&largest.evaluation, Mode::Evaluate).context("an evaluation")?;
        let trained: usize = built.parameters.iter().filter(|p| p.is_trainable()).map(|p| p.range().len()).sum();
        // Moments of what is frozen are zeros that nothing touches: the system gives no memory for them.
        let parameter_bytes = (size_of::<f32>() * 2 * (built.parameters.elements() + trained)) as u64;
        Ok(Self {
            peak_bytes: parameter_bytes + step_bytes.max(evaluation_bytes) + REST,
            parameter_bytes,
            step_bytes,
            evaluation_bytes,
            rest_bytes: REST,
            tokens: largest.step.iter().sum::<u32>() as usize,
            from_data: largest.from_data,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Overrides};

    fn settings(sets: &[&str]) -> config::Train {
        let sets = sets.iter().map(|set| (*set).to_owned()).collect();
        Config::load(None, &Overrides { sets, ..Overrides::default() }).unwrap().models[0].train.clone()
    }

    #[test]
    fn no_batch_is_larger_than_is_assumed() {
        let tokens = |lengths: &[u32]| lengths.iter().sum::<u32>();
        for (batch_size, budget, max_length) in [(16, 1000, 128), (16, 4096, 128), (5, 64, 100), (7, 300, 100)] {
            let settings =
                settings(&[&format!("train.batch_size={batch_size}"), &format!("train.micro_batch_tokens={budget}")]);
            let assumed = Largest::assumed(max_length, &settings);
            assert!(assumed.step.iter().chain(&assumed.evaluation).all(|&length| length as usize <= max_length));
            for seed in 0..50 {
                let lengths: Vec<u32> = (0..batch_size).map(|i| 1 + (i * 37 + seed * 91) % max_length as u32).collect();
                let all: Vec<u32> = (0..batch_size).collect();
                for batch in sampler::cut(&all, &lengths, budget, 1) {
                    let load: u32 = batch.iter().map(|&i| lengths[i as usize]).sum();
                    assert!(load <= tokens(&assumed.step), "{load} of {:?}", assumed.step);
                }
            }
        }
        let whole = Largest::assumed(128, &settings(&[]));
        assert_eq!((tokens(&whole.step), tokens(&whole.evaluation)), (16 * 128, 4096));
        let cut = Largest::assumed(128, &settings(&["train.gradient_accumulation_steps=3"]));
        assert_eq!(cut.step, [128; 6]);
        let longer = Largest::assumed(512, &settings(&["train.micro_batch_tokens=100"]));
        assert_eq!((longer.step, longer.evaluation), (vec![512], vec![512]));
    }

    #[test]
    fn what_is_frozen_has_no_moments() {
        let config = serde_json::json!({
            "model_type": "bert", "vocab_size": 7, "hidden_size": 4, "num_hidden_layers": 2,
            "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 8,
        });
        let built = kiln_models::declare(config.as_object().unwrap()).unwrap();
        let settings = settings(&[]);
        let plan = || Memory::plan(&built, &settings, &Largest::assumed(8, &settings)).unwrap();
        let (all, elements) = (plan(), built.parameters.elements() as u64);
        assert_eq!(all.parameter_bytes, 16 * elements);
        built.parameters.iter().filter(|p| p.name().starts_with("bert.")).for_each(|p| p.set_trainable(false));
        let head = plan();
        assert_eq!(head.parameter_bytes, 8 * elements + 8 * (4 * 2 + 2));
        assert!(head.step_bytes < all.step_bytes && head.peak_bytes < all.peak_bytes);
    }
}
