//! The certificate of a quantised model: its predictions against those of the fp32 model.
//!
//! [`verify`](super::verify) asks for the same logits, to rounding. Integers cannot give those: what
//! is asked of them is the same predictions, on a whole part, in the batches that it is run in.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::data::Dataset;
use crate::{metrics, user_error};

/// Of a part's examples, the share that both models predict alike, at least.
const AGREEMENT: f64 = 0.99;

/// Macro F1 that the quantised model may lose; what it gains is no fault.
const F1_LOSS: f64 = 0.005;

/// The content of export.int8.json and of test/certificate.int8.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Rows of the part.
    pub examples: usize,
    /// Of these, the share that both models predict alike.
    pub agreement: f64,
    /// Largest difference of a logit.
    pub max_abs_diff: f64,
    /// Mean difference of a logit.
    pub mean_abs_diff: f64,
    /// Macro F1 of the fp32 model on the part.
    pub f1_fp32: f64,
    /// Macro F1 of the quantised model on the part.
    pub f1_int8: f64,
    /// Size of the fp32 model, its tensors included.
    pub bytes_fp32: u64,
    /// Size of the quantised model, its tensors included.
    pub bytes_int8: u64,
}

impl Agreement {
    /// Compares the logits that two models, of `bytes` each, gave for `dataset`: the fp32 one's, the
    /// quantised one's.
    ///
    /// # Errors
    /// Logits that are not finite, or not as many as rows; a row without a label.
    pub fn new(labels: &[String], dataset: &Dataset, logits: [&[Vec<f32>]; 2], bytes: [u64; 2]) -> Result<Agreement> {
        let truth: Option<Vec<u32>> = (0..dataset.len()).map(|i| dataset.label(i)).collect();
        compare(labels, &truth.context("a row to compare the models on has no label")?, logits, bytes)
    }

    /// Lets the quantised model pass, or says by how much it fails and the `fix`.
    ///
    /// # Errors
    /// The user's, where the two predict alike on less than 0.99 of the examples, or the quantised
    /// model's macro F1 is more than 0.005 below the fp32 model's.
    pub fn gate(&self, fix: &str) -> Result<()> {
        let Agreement { examples, agreement, f1_fp32, f1_int8, max_abs_diff, .. } = self;
        if *agreement >= AGREEMENT && f1_fp32 - f1_int8 <= F1_LOSS {
            return Ok(());
        }
        Err(user_error!(
            "the int8 model and the fp32 one part: they agree on {agreement:.4} of {examples} examples (needs {AGREEMENT}), \
             with a macro F1 of {f1_int8:.4} after {f1_fp32:.4} (may lose {F1_LOSS}) and logits that differ by up to \
             {max_abs_diff:.2}; {fix}"
        ))
    }
}

fn compare(labels: &[String], truth: &[u32], logits: [&[Vec<f32>]; 2], bytes: [u64; 2]) -> Result<Agreement> {
    let [fp32, int8] = logits;
    ensure!(!truth.is_empty(), "there is no row to compare the models on");
    ensure!(
        [fp32.len(), int8.len()] == [truth.len(); 2] && fp32.iter().zip(int8).all(|(a, b)| a.len() == b.len()),
        "{} rows have {} rows of fp32 logits and {} of int8 logits, or of other widths",
        truth.len(),
        fp32.len(),
        int8.len()
    );
    let predicted = |logits: &[Vec<f32>]| logits.iter().map(|row| metrics::argmax(row)).collect::<Result<Vec<u32>>>();
    let predicted = [predicted(fp32)?, predicted(int8)?];
    let alike = predicted[0].iter().zip(&predicted[1]).filter(|(a, b)| a == b).count();
    let [f1_fp32, f1_int8] = predicted.map(|predicted| metrics::statistics(labels, truth, &predicted, None).macro_f1);
    let pairs = || fp32.iter().flatten().zip(int8.iter().flatten());
    let differences = || pairs().map(|(a, b)| f64::from((a - b).abs()));
    Ok(Agreement {
        examples: truth.len(),
        agreement: alike as f64 / truth.len() as f64,
        max_abs_diff: differences().fold(0.0, f64::max),
        mean_abs_diff: differences().sum::<f64>() / pairs().count().max(1) as f64,
        f1_fp32,
        f1_int8,
        bytes_fp32: bytes[0],
        bytes_int8: bytes[1],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of two labels that predict `predicted`.
    fn logits(predicted: &[u32]) -> Vec<Vec<f32>> {
        predicted.iter().map(|&p| if p == 0 { vec![1.0, 0.0] } else { vec![0.0, 1.0] }).collect()
    }

    /// What comparing 300 rows gives where the models have these rows wrong.
    fn wrong(fp32: &[usize], int8: &[usize]) -> Agreement {
        let truth: Vec<u32> = (0..300).map(|i| i % 2).collect();
        let predicted = |wrong: &[usize]| {
            let flip = |(i, label): (usize, &u32)| if wrong.contains(&i) { 1 - label } else { *label };
            logits(&truth.iter().enumerate().map(flip).collect::<Vec<_>>())
        };
        let labels = ["a", "b"].map(String::from);
        compare(&labels, &truth, [&predicted(fp32), &predicted(int8)], [4, 1]).unwrap()
    }

    #[test]
    fn the_gate_asks_for_agreement_and_f1() {
        let same = wrong(&[3], &[3]);
        assert_eq!((same.agreement, same.max_abs_diff, same.mean_abs_diff), (1.0, 0.0, 0.0));
        assert_eq!((same.f1_fp32, same.bytes_fp32, same.bytes_int8), (same.f1_int8, 4, 1));
        assert!(same.gate("").is_ok());

        // A row in 300 is a third of a point of F1: two are alike enough, and too much to lose.
        assert!(wrong(&[], &[3]).gate("").is_ok());
        let error = wrong(&[], &[3, 4]).gate("drop it").unwrap_err();
        assert!(error.is::<crate::error::UserError>());
        assert_eq!(
            error.to_string(),
            "the int8 model and the fp32 one part: they agree on 0.9933 of 300 examples (needs 0.99), with a macro F1 of \
             0.9933 after 1.0000 (may lose 0.005) and logits that differ by up to 1.00; drop it"
        );
        // Better predictions are other ones too: no loss of F1, and no agreement.
        assert!(wrong(&[3, 4, 5], &[]).gate("").is_ok());
        let other = wrong(&[3, 4, 5, 6], &[]);
        assert!(other.f1_int8 > other.f1_fp32);
        assert!(other.gate("").is_err());
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let labels = ["a", "b"].map(String::from);
        let compare = |truth: &[u32], a: &[Vec<f32>], b: &[Vec<f32>]| compare(&labels, truth, [a, b], [0, 0]);
        assert!(compare(&[], &[], &[]).is_err());
        assert!(compare(&[0, 1], &logits(&[0, 1]), &logits(&[0])).is_err());
        assert!(compare(&[0], &logits(&[0]), &[vec![0.0; 3]]).is_err());
        assert!(compare(&[0], &logits(&[0]), &[vec![f32::NAN, 0.0]]).is_err());
    }
}
