//! A pass over a part without gradients.

use anyhow::{Context, Result, ensure};

use crate::data::{Dataset, sampler};
use crate::dist::Communicator;
use crate::metrics::{self, Statistics};
use crate::pretrained::Classifier;

/// What the model says of each example of a part.
pub struct Evaluated {
    /// The labels, by example.
    pub truth: Vec<u32>,
    /// The predictions, by example.
    pub predicted: Vec<u32>,
    /// Mean cross-entropy, without class weights or label smoothing.
    pub loss: f64,
}

impl Evaluated {
    /// The figures.
    pub fn statistics(&self, labels: &[String]) -> Statistics {
        metrics::statistics(labels, &self.truth, &self.predicted, Some(self.loss))
    }
}

/// Evaluates `classifier` on `dataset`, `tokens` at once, on all ranks together: every example once.
///
/// # Errors
/// An example without a label, logits that are not finite, what the forward says, or a rank that is
/// lost.
pub fn evaluate(ranks: &Communicator, classifier: &Classifier, dataset: &Dataset, tokens: usize) -> Result<Evaluated> {
    let mut seen: Vec<(usize, u32, f64)> = Vec::new(); // example, prediction, loss
    for batch in batches(dataset, tokens).iter().skip(ranks.rank()).step_by(ranks.world_size()) {
        for (&i, logits) in batch.iter().zip(batch_logits(classifier, dataset, batch)?) {
            let label = dataset.label(i).with_context(|| format!("example {i} has no label"))?;
            let predicted = metrics::argmax(&logits).with_context(|| format!("logits of example {i}"))?;
            seen.push((i, predicted, metrics::cross_entropy(&logits, label)));
        }
    }
    let mut seen = ranks.all_gather(&seen)?.concat();
    seen.sort_unstable_by_key(|(i, ..)| *i);
    ensure!(seen.iter().map(|(i, ..)| *i).eq(0..dataset.len()), "the ranks did not see every example once");
    Ok(Evaluated {
        truth: dataset.labels()?,
        predicted: seen.iter().map(|(_, predicted, _)| *predicted).collect(),
        loss: seen.iter().map(|(.., loss)| loss).sum::<f64>() / dataset.len().max(1) as f64,
    })
}

/// The logits `[labels]` of every example of `dataset`, `tokens` at once, on this process alone.
///
/// # Errors
/// What the forward says.
pub fn logits(classifier: &Classifier, dataset: &Dataset, tokens: usize) -> Result<Vec<Vec<f32>>> {
    let mut all = vec![Vec::new(); dataset.len()];
    for batch in batches(dataset, tokens) {
        for (&i, logits) in batch.iter().zip(batch_logits(classifier, dataset, &batch)?) {
            all[i] = logits;
        }
    }
    Ok(all)
}

fn batches(dataset: &Dataset, tokens: usize) -> Vec<Vec<usize>> {
    let lengths: Vec<usize> = (0..dataset.len()).map(|i| dataset.length(i)).collect();
    sampler::sorted_batches(&lengths, tokens)
}

fn batch_logits(classifier: &Classifier, dataset: &Dataset, batch: &[usize]) -> Result<Vec<Vec<f32>>> {
    let examples: Vec<_> = batch.iter().map(|&i| dataset.example(i)).collect();
    classifier.logits(&examples)
}
