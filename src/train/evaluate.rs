//! A pass over a part without gradients.

use anyhow::{Context, Result};

use crate::data::{Dataset, sampler};
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

/// Evaluates `classifier` on `dataset`, `tokens` at once.
///
/// # Errors
/// An example without a label, logits that are not finite, or what the forward says.
pub fn evaluate(classifier: &Classifier, dataset: &Dataset, tokens: usize) -> Result<Evaluated> {
    let lengths: Vec<usize> = (0..dataset.len()).map(|i| dataset.length(i)).collect();
    let mut evaluated = Evaluated { truth: vec![0; dataset.len()], predicted: vec![0; dataset.len()], loss: 0.0 };
    let mut losses = vec![0.0; dataset.len()];
    for batch in sampler::sorted_batches(&lengths, tokens) {
        let examples: Vec<_> = batch.iter().map(|&i| dataset.example(i)).collect();
        for (&i, logits) in batch.iter().zip(classifier.logits(&examples)?) {
            let label = dataset.label(i).with_context(|| format!("example {i} has no label"))?;
            evaluated.truth[i] = label;
            evaluated.predicted[i] = metrics::argmax(&logits).with_context(|| format!("logits of example {i}"))?;
            losses[i] = metrics::cross_entropy(&logits, label);
        }
    }
    evaluated.loss = losses.iter().sum::<f64>() / dataset.len().max(1) as f64;
    Ok(evaluated)
}
