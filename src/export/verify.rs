//! The certificate of an export: ONNX Runtime's logits against those of the model that was trained.
//!
//! Both read a whole part, and a sweep of lengths: a graph captured for one shape by mistake, a mask
//! that leaks or a position off by one shows at some length, or only beside a longer neighbour.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::data::{Dataset, Example, sampler};
use crate::infer::Predictor;
use crate::metrics;
use crate::pretrained::Classifier;

/// The largest difference of a logit that passes: fp32 sums in another order stay well below.
pub const TOLERANCE: f64 = 1e-4;

/// Two best logits no further apart than this may change places: each may move by [`TOLERANCE`].
const TIE: f32 = 2e-4;

/// The content of export.json and of test/certificate.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// Rows of the part; the sweep comes on top.
    pub examples: usize,
    /// Largest difference of a logit, over rows and sweep, as are the next two.
    pub max_abs_diff: f64,
    /// Mean difference of a logit.
    pub mean_abs_diff: f64,
    /// Predictions that differ, where the two best logits are further apart than 2e-4.
    pub argmax_flips: usize,
    /// Lengths of the sweep, in tokens.
    pub lengths: Vec<usize>,
    /// Macro F1 of the trained model on the part.
    pub f1_trained: f64,
    /// Macro F1 of ONNX Runtime on the part.
    pub f1_onnx: f64,
}

/// What both models say, and where they are furthest apart.
#[derive(Default)]
struct Comparison {
    max: f64,
    sum: f64,
    logits: usize,
    flips: usize,
    worst: String,
}

impl Comparison {
    fn add(&mut self, place: impl Fn() -> String, trained: &[f32], onnx: &[f32]) -> Result<()> {
        ensure!(trained.len() == onnx.len(), "{}: {} logits, and {} trained", place(), onnx.len(), trained.len());
        let differences = trained.iter().zip(onnx).map(|(a, b)| f64::from((a - b).abs()));
        // NaN is no small difference, and `max` would pass over it.
        let differences = differences.map(|d| if d.is_nan() { f64::INFINITY } else { d });
        let max = differences.clone().fold(0.0, f64::max);
        if max > self.max {
            self.max = max;
            self.worst = format!("{}: trained {trained:?}, ONNX Runtime {onnx:?}", place());
        }
        self.sum += differences.sum::<f64>();
        self.logits += trained.len();
        let mut sorted = trained.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let tie = matches!(sorted[..], [best, second, ..] if best - second <= TIE);
        if max.is_finite() && !tie && metrics::argmax(trained)? != metrics::argmax(onnx)? {
            self.flips += 1;
        }
        Ok(())
    }
}

/// Compares the trained `classifier` with `predictor` on `dataset`, for which the latter gave
/// `logits`, and on sequences of lengths up to `max_length`. `tokens` go through the classifier at
/// once.
///
/// # Errors
/// Where they part: a logit differs by more than [`TOLERANCE`], or a prediction does. The error says
/// at which row or length, and both logits. And what the two say themselves.
pub fn certify(
    classifier: &Classifier,
    predictor: &Predictor,
    dataset: &Dataset,
    logits: &[Vec<f32>],
    max_length: usize,
    tokens: usize,
) -> Result<Certificate> {
    ensure!(!dataset.is_empty(), "there is no row to compare the models on");
    let mut comparison = Comparison::default();

    let examples: Vec<_> = (0..dataset.len()).map(|i| dataset.example(i)).collect();
    let trained = trained_logits(classifier, &examples, tokens)?;
    for (i, (trained, onnx)) in trained.iter().zip(logits).enumerate() {
        comparison.add(|| format!("row {i} ({} tokens)", dataset.length(i)), trained, onnx)?;
    }

    let sweep = Sweep::new(dataset, max_length);
    let examples = sweep.examples();
    let swept = trained_logits(classifier, &examples, tokens)?;
    for (example, trained) in examples.iter().zip(&swept) {
        let place = || format!("a sequence of {} tokens alone", example.input_ids.len());
        let onnx = predictor.run([*example]).with_context(place)?;
        comparison.add(place, trained, &onnx[0])?;
    }
    for batch in sweep.batches((tokens / max_length.max(1)).max(2)) {
        let onnx = predictor.run(batch.iter().map(|&i| examples[i]))?;
        let padded = batch.iter().map(|&i| examples[i].input_ids.len()).max().unwrap_or(0);
        for (&i, onnx) in batch.iter().zip(&onnx) {
            let place = || format!("a sequence of {} tokens padded to {padded}", examples[i].input_ids.len());
            comparison.add(place, &swept[i], onnx)?;
        }
    }

    let truth: Option<Vec<u32>> = (0..dataset.len()).map(|i| dataset.label(i)).collect();
    let truth = truth.context("a row to compare the models on has no label")?;
    let f1 = |logits: &[Vec<f32>]| -> Result<f64> {
        let predicted: Vec<u32> = logits.iter().map(|logits| metrics::argmax(logits)).collect::<Result<_>>()?;
        Ok(metrics::statistics(classifier.id2label(), &truth, &predicted, None).macro_f1)
    };
    let Comparison { max, sum, logits: count, flips, worst } = comparison;
    if flips > 0 || max > TOLERANCE {
        bail!(
            "the exported model and the trained one part: their logits differ by up to {max:.1e} (at most {TOLERANCE:.0e} \
             passes), and {flips} predictions differ; furthest apart are\n  {worst}"
        );
    }
    Ok(Certificate {
        examples: dataset.len(),
        max_abs_diff: max,
        mean_abs_diff: sum / count as f64,
        argmax_flips: flips,
        lengths: sweep.lengths,
        f1_trained: f1(&trained)?,
        f1_onnx: f1(logits)?,
    })
}

/// The classifier's logits of `examples`, in order, so many `tokens` at once.
fn trained_logits(classifier: &Classifier, examples: &[Example<'_>], tokens: usize) -> Result<Vec<Vec<f32>>> {
    let lengths: Vec<usize> = examples.iter().map(|example| example.input_ids.len()).collect();
    let mut logits = vec![Vec::new(); examples.len()];
    for batch in sampler::sorted_batches(&lengths, tokens) {
        let examples: Vec<_> = batch.iter().map(|&i| examples[i]).collect();
        for (&i, row) in batch.iter().zip(classifier.logits(&examples)?) {
            logits[i] = row;
        }
    }
    Ok(logits)
}

/// Sequences of chosen lengths, cut from real rows laid end to end.
struct Sweep {
    lengths: Vec<usize>,
    input_ids: Vec<Vec<i32>>,
    token_type_ids: Option<Vec<Vec<i8>>>,
}

impl Sweep {
    /// One sequence for each of [`lengths`], each from another row on.
    fn new(dataset: &Dataset, max_length: usize) -> Sweep {
        let lengths = lengths(max_length);
        let rows = |start: usize| (start..).map(|i| i % dataset.len());
        let typed = dataset.token_type_ids(0).is_some();
        let types = |i| dataset.token_type_ids(i).unwrap_or_default();
        Sweep {
            input_ids: (0..)
                .zip(&lengths)
                .map(|(start, &n)| rows(start).flat_map(|i| dataset.input_ids(i)).copied().take(n).collect())
                .collect(),
            token_type_ids: typed.then(|| {
                (0..).zip(&lengths).map(|(start, &n)| rows(start).flat_map(types).copied().take(n).collect()).collect()
            }),
            lengths,
        }
    }

    fn examples(&self) -> Vec<Example<'_>> {
        let types = |i: usize| self.token_type_ids.as_ref().map(|types| types[i].as_slice());
        (0..).zip(&self.input_ids).map(|(i, ids)| Example { input_ids: ids, token_type_ids: types(i) }).collect()
    }

    /// Sequences by number in batches of `rows`, the longest beside the shortest.
    fn batches(&self, rows: usize) -> Vec<Vec<usize>> {
        let n = self.lengths.len();
        let mixed: Vec<usize> = (0..n).map(|i| if i % 2 == 0 { n - 1 - i / 2 } else { i / 2 }).collect();
        mixed.chunks(rows).map(<[usize]>::to_vec).collect()
    }
}

/// All lengths up to 16, then each half as long again, up to `max_length`.
fn lengths(max_length: usize) -> Vec<usize> {
    let longer = std::iter::successors(Some(24), |n| Some(n + n / 2)).take_while(|&n| n < max_length);
    let mut lengths: Vec<usize> = (1..=max_length.min(16)).chain(longer).collect();
    if max_length > 16 {
        lengths.push(max_length);
    }
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_all_of_the_short_ones_then_fewer() {
        assert_eq!(lengths(3), [1, 2, 3]);
        assert_eq!(lengths(16).len(), 16);
        assert_eq!(lengths(17)[15..], [16, 17]);
        assert_eq!(lengths(512)[15..], [16, 24, 36, 54, 81, 121, 181, 271, 406, 512]);
    }

    #[test]
    fn every_sequence_is_padded_beside_a_longer_one_but_the_longest() {
        let lengths = lengths(512);
        let sweep = Sweep { input_ids: Vec::new(), token_type_ids: None, lengths };
        for rows in [2, 8] {
            let batches = sweep.batches(rows);
            let mut all = batches.concat();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..sweep.lengths.len()));
            assert!(batches.iter().all(|batch| batch.len() <= rows));
            let padded = batches.iter().flat_map(|batch| batch.iter().map(|i| Some(i) != batch.iter().max()));
            assert!(padded.filter(|&padded| padded).count() >= sweep.lengths.len() / 2);
        }
    }

    #[test]
    fn what_parts_is_counted_and_named() {
        let mut comparison = Comparison::default();
        let mut add = |place: &str, trained: &[f32], onnx: &[f32]| {
            comparison.add(|| place.into(), trained, onnx).unwrap();
            (comparison.max, comparison.flips, comparison.worst.clone())
        };
        assert_eq!(add("the same", &[1.0, 2.0], &[1.0, 2.0]), (0.0, 0, String::new()));
        // Two logits that are as good as equal may change places.
        assert_eq!(add("a tie", &[1.0, 1.0001], &[1.0001, 1.0]).1, 0);
        let (max, flips, worst) = add("a flip", &[1.0, 2.0, 0.0], &[2.0, 1.0, 0.0]);
        assert_eq!((max, flips), (1.0, 1));
        assert_eq!(worst, "a flip: trained [1.0, 2.0, 0.0], ONNX Runtime [2.0, 1.0, 0.0]");
        assert_eq!(add("NaN", &[f32::NAN, 1.0], &[0.0, 1.0]).0, f64::INFINITY);
        assert!(comparison.add(|| "fewer".into(), &[1.0], &[]).is_err());
    }
}
