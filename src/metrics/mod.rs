//! What a classifier's predictions are worth: pure functions of label ids, equal to scikit-learn's.
//!
//! A ratio whose denominator is 0 (a label that nobody predicted, a part without rows) is 0, as
//! scikit-learn's `zero_division=0` has it, and every average runs over all labels of the
//! dataset, also those that a part has no row of.

mod bootstrap;
mod calibration;
mod mcnemar;
pub mod scaling;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

pub use bootstrap::{CONFIDENCE, Paired, RESAMPLES, paired_bootstrap};
pub use calibration::{Bin, Calibration, Temperature};
pub use mcnemar::mcnemar;

use crate::config::Metric;

/// The content of a `statistics.json`: how well one model does on one part of the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// Rows that were predicted.
    pub examples: u64,
    /// Share of rows whose label was predicted.
    pub accuracy: f64,
    /// Mean of the labels' F1.
    pub macro_f1: f64,
    /// F1 of the sums over labels: the accuracy, where each row has one label.
    pub micro_f1: f64,
    /// Mean of the labels' F1, weighted by their rows.
    pub weighted_f1: f64,
    /// Mean cross-entropy, where it was computed.
    pub loss: Option<f64>,
    /// Each label's part, by F1 descending, then by label.
    pub labels: Vec<LabelStatistics>,
    /// How far the model's probabilities can be believed, where there were any.
    #[serde(flatten)]
    pub calibration: Option<Calibration>,
    /// How fast the predictions were made, where that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throughput: Option<Throughput>,
    /// How long the model was trained, its evaluations included, where one process did all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training_seconds: Option<f64>,
}

/// How well one label is told from the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabelStatistics {
    /// The label's name.
    pub label: String,
    /// Rows of this label.
    pub count: u64,
    /// Rows of this label that were predicted as it.
    pub correct: u64,
    /// `correct` by the rows that were predicted as this label.
    pub precision: f64,
    /// `correct` by `count`.
    pub recall: f64,
    /// Harmonic mean of precision and recall.
    pub f1: f64,
    /// `correct` by `count`, under the name that readers of a per-label accuracy look for.
    pub accuracy: f64,
}

/// How fast a model predicted, wall-clock, over the whole part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Wall-clock time in seconds.
    pub seconds: f64,
    /// Rows a second.
    pub examples_per_second: f64,
    /// Tokens a second; padding is not counted.
    pub tokens_per_second: f64,
}

impl Throughput {
    /// The throughput of `examples` rows with `tokens` tokens in `seconds`.
    pub fn new(examples: u64, tokens: u64, seconds: f64) -> Self {
        Self {
            seconds,
            examples_per_second: ratio(examples as f64, seconds),
            tokens_per_second: ratio(tokens as f64, seconds),
        }
    }
}

impl Statistics {
    /// The value of one metric; NaN for a loss that was not computed.
    pub fn get(&self, metric: Metric) -> f64 {
        match metric {
            Metric::MacroF1 => self.macro_f1,
            Metric::Accuracy => self.accuracy,
            Metric::MicroF1 => self.micro_f1,
            Metric::WeightedF1 => self.weighted_f1,
            Metric::Loss => self.loss.unwrap_or(f64::NAN),
        }
    }
}

/// Compares the labels of some rows with the predictions for them.
///
/// `labels` are the names in id order; `truth[i]` and `predicted[i]` are row i's ids.
///
/// # Panics
/// Where `truth` and `predicted` differ in length or hold an id that `labels` has no name for:
/// readers check ids, and [`argmax`] of a model's logits gives none outside.
pub fn statistics(labels: &[String], truth: &[u32], predicted: &[u32], loss: Option<f64>) -> Statistics {
    let mut count = vec![0u64; labels.len()]; // [labels]: rows of this label
    let mut claimed = vec![0u64; labels.len()]; // [labels]: rows predicted as this label
    let mut correct = vec![0u64; labels.len()]; // [labels]: both
    for (truth, predicted) in pairs(truth, predicted) {
        count[truth] += 1;
        claimed[predicted] += 1;
        correct[truth] += u64::from(truth == predicted);
    }

    let mut of_labels: Vec<_> = labels
        .iter()
        .enumerate()
        .map(|(id, label)| {
            let hits = correct[id] as f64;
            let recall = ratio(hits, count[id] as f64);
            LabelStatistics {
                label: label.clone(),
                count: count[id],
                correct: correct[id],
                precision: ratio(hits, claimed[id] as f64),
                recall,
                f1: ratio(2.0 * hits, (count[id] + claimed[id]) as f64),
                accuracy: recall,
            }
        })
        .collect();

    let examples = truth.len() as f64;
    let accuracy = ratio(correct.iter().sum::<u64>() as f64, examples);
    let sum = |weight: &dyn Fn(&LabelStatistics) -> f64| -> f64 { of_labels.iter().map(|l| weight(l) * l.f1).sum() };
    let macro_f1 = ratio(sum(&|_| 1.0), labels.len() as f64);
    let weighted_f1 = ratio(sum(&|l| l.count as f64), examples);

    of_labels.sort_by(|a, b| b.f1.total_cmp(&a.f1).then_with(|| a.label.cmp(&b.label)));
    Statistics {
        examples: truth.len() as u64,
        accuracy,
        macro_f1,
        // Every row that one label misses is one that another label claims: over all labels
        // false negatives and false positives are the same rows.
        micro_f1: accuracy,
        weighted_f1,
        loss,
        labels: of_labels,
        calibration: None,
        throughput: None,
        training_seconds: None,
    }
}

/// What a model predicts for each row by its logits `[labels]`, and the statistics of that, with the mean
/// cross-entropy and the calibration, at `temperature` too where the model has one.
///
/// # Errors
/// As [`argmax`]'s, naming the row.
///
/// # Panics
/// As [`statistics`] does.
pub fn judge(
    labels: &[String],
    truth: &[u32],
    logits: &[Vec<f32>],
    temperature: Option<f64>,
) -> Result<(Vec<u32>, Statistics)> {
    let predict = |(row, logits): (usize, &Vec<f32>)| argmax(logits).with_context(|| format!("logits of row {row}"));
    let predicted: Vec<u32> = logits.iter().enumerate().map(predict).collect::<Result<_>>()?;
    let losses = logits.iter().zip(truth).map(|(logits, &label)| cross_entropy(logits, label));
    let loss = losses.sum::<f64>() / truth.len().max(1) as f64;
    let mut statistics = statistics(labels, truth, &predicted, Some(loss));
    statistics.calibration = Some(Calibration::new(truth, logits, temperature));
    Ok((predicted, statistics))
}

/// How often each label was taken for which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    counts: Vec<u64>, // [truth, prediction]
}

impl Confusion {
    /// Number of classes: the matrix is square.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Rows of class `truth` that were predicted as class `predicted`.
    pub fn get(&self, truth: usize, predicted: usize) -> u64 {
        self.row(truth)[predicted]
    }

    /// What the rows of class `truth` were predicted as: `[classes]`.
    pub fn row(&self, truth: usize) -> &[u64] {
        &self.counts[truth * self.classes..][..self.classes]
    }
}

/// Counts what `n` classes were taken for.
///
/// # Panics
/// As [`statistics`] does.
pub fn confusion(n: usize, truth: &[u32], predicted: &[u32]) -> Confusion {
    let mut counts = vec![0; n * n];
    for (truth, predicted) in pairs(truth, predicted) {
        // Without this, a prediction past the last class would count in the next class's row.
        assert!(predicted < n, "predicted class {predicted} of {n}");
        counts[truth * n + predicted] += 1;
    }
    Confusion { classes: n, counts }
}

fn pairs(truth: &[u32], predicted: &[u32]) -> impl Iterator<Item = (usize, usize)> {
    assert_eq!(truth.len(), predicted.len(), "one prediction for each row");
    truth.iter().zip(predicted).map(|(&truth, &predicted)| (truth as usize, predicted as usize))
}

fn ratio(numerator: f64, denominator: f64) -> f64 {
    if denominator == 0.0 { 0.0 } else { numerator / denominator }
}

/// The class with the highest logit, the first of equal ones.
///
/// # Errors
/// Where there is no logit, or one that is not a number: such a row has no prediction.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    ensure!(!logits.is_empty(), "a row without logits has no prediction");
    let mut best = 0;
    for (class, &logit) in logits.iter().enumerate() {
        ensure!(
            !logit.is_nan(),
            "the logit of class {class} is not a number: the model's weights or the input's are broken"
        );
        if logit > logits[best] {
            best = class;
        }
    }
    Ok(best as u32)
}

/// The classes' probabilities: `exp(logit / T) / Σ exp(logits / T)` at the temperature T, without overflow
/// for any finite logits.
pub fn softmax(logits: &[f32], temperature: f64) -> Vec<f32> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit - highest) / temperature).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| (e / sum) as f32).collect()
}

/// The cross-entropy of one example's logits, in f64.
pub fn cross_entropy(logits: &[f32], label: u32) -> f64 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
    sum.ln() - f64::from(logits[label as usize] - highest)
}

#[cfg(test)]
mod tests;
