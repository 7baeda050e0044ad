//! Whether a model is right as often as its probabilities say, and the one number that helps where it is
//! not: both as in Guo et al. 2017, "On Calibration of Modern Neural Networks".
//!
//! Logits by a temperature T > 0 before the softmax keep every prediction and change every probability.

use serde::{Deserialize, Serialize};

use super::ratio;

/// Bins of equal width that confidences fall into.
const BINS: usize = 15;

/// The temperatures that [`Temperature::fit`] chooses from. Where the model has every row right, NLL falls
/// for ever as T → 0, and where it is worse than guessing, as T → ∞: then T ends at a bound.
const BOUNDS: [f64; 2] = [0.05, 20.0];

/// How well a model's confidence agrees with its accuracy, in a statistics.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Expected calibration error: the mean of |accuracy − confidence| of the bins, weighted by their rows.
    pub ece: f64,
    /// The same by probabilities at `temperature`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ece_scaled: Option<f64>,
    /// The model's temperature, fitted on the validation part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// The bins behind `ece`, from confidence 0 to 1: a reliability diagram.
    pub reliability: Vec<Bin>,
}

/// The rows whose confidence, the probability of what was predicted, lies in (`lower`, `upper`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// The confidence that it begins above.
    pub lower: f64,
    /// The highest confidence in it.
    pub upper: f64,
    /// Its rows.
    pub count: u64,
    /// Their mean confidence; 0 without rows.
    pub confidence: f64,
    /// The share of them whose label was predicted; 0 without rows.
    pub accuracy: f64,
}

/// A model's temperature: the content of `model/calibration.json`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Temperature {
    /// What logits are divided by.
    pub temperature: f64,
    /// Mean NLL of the rows that it was fitted on, before.
    pub nll: f64,
    /// The same at the temperature: never more.
    pub nll_scaled: f64,
    /// NLL has no least value, or beyond the bounds, and the temperature is the bound 0.05 or 20.
    pub at_bound: bool,
}

impl Calibration {
    /// Compares the confidence of each row's logits `[classes]` with whether they are right, and the same
    /// at `temperature`, where the model has one.
    ///
    /// # Panics
    /// As [`statistics`](super::statistics); a row without logits.
    pub fn new(truth: &[u32], logits: &[Vec<f32>], temperature: Option<f64>) -> Self {
        let reliability = reliability(truth, logits, 1.0);
        let ece_scaled = temperature.map(|temperature| ece(&self::reliability(truth, logits, temperature)));
        Self { ece: ece(&reliability), ece_scaled, temperature, reliability }
    }
}

/// The bins of all rows at a temperature.
fn reliability(truth: &[u32], logits: &[Vec<f32>], temperature: f64) -> Vec<Bin> {
    assert_eq!(truth.len(), logits.len(), "logits for each row");
    let mut sums = [(0u64, 0.0, 0u64); BINS]; // rows, their confidence, those that are right
    for (&label, logits) in truth.iter().zip(logits) {
        let best = (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        let shifted = |&logit: &f32| f64::from(logit) - f64::from(logits[best]);
        let confidence = 1.0 / logits.iter().map(|logit| (shifted(logit) / temperature).exp()).sum::<f64>();
        let bin = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        sums[bin].0 += 1;
        sums[bin].1 += confidence;
        sums[bin].2 += u64::from(best as u32 == label);
    }
    let edge = |i: usize| i as f64 / BINS as f64;
    let bin = |(i, &(count, confidence, right)): (usize, &(u64, f64, u64))| Bin {
        lower: edge(i),
        upper: edge(i + 1),
        count,
        confidence: ratio(confidence, count as f64),
        accuracy: ratio(right as f64, count as f64),
    };
    sums.iter().enumerate().map(bin).collect()
}

fn ece(bins: &[Bin]) -> f64 {
    let rows: u64 = bins.iter().map(|bin| bin.count).sum();
    ratio(bins.iter().map(|bin| bin.count as f64 * (bin.accuracy - bin.confidence).abs()).sum(), rows as f64)
}

impl Temperature {
    /// Fits T to the least mean NLL of `logits` `[classes]` of rows whose classes are `truth`. NLL is convex
    /// in 1/T: Newton's steps on its derivative, inside a bracket that each step narrows.
    ///
    /// Without rows, and where no T changes anything, T is 1.
    ///
    /// # Panics
    /// As [`statistics`](super::statistics).
    pub fn fit(truth: &[u32], logits: &[Vec<f32>]) -> Self {
        assert_eq!(truth.len(), logits.len(), "logits for each row");
        let at = |inverse: f64| Nll::at(truth, logits, inverse);
        let (plain, [mut low, mut high]) = (at(1.0), [1.0 / BOUNDS[1], 1.0 / BOUNDS[0]]);
        let mut inverse: f64 = 1.0;
        let mut here = plain;
        let mut at_bound = false;
        if here.slope == 0.0 {
            // Flat, or the least already.
        } else if let Some(bound) =
            [(high, at(high).slope < 0.0), (low, at(low).slope > 0.0)].iter().find(|(_, on)| *on)
        {
            (inverse, at_bound) = (bound.0, true);
        } else {
            for _ in 0..200 {
                if here.slope > 0.0 {
                    high = inverse
                } else {
                    low = inverse
                }
                let newton = inverse - here.slope / here.curvature;
                let next = if newton > low && newton < high { newton } else { 0.5 * (low + high) };
                let moved = (next - inverse).abs();
                inverse = next;
                if moved <= 1e-12 * inverse {
                    break;
                }
                here = at(inverse);
            }
        }
        let scaled = at(inverse);
        if scaled.value < plain.value {
            Self { temperature: 1.0 / inverse, nll: plain.value, nll_scaled: scaled.value, at_bound }
        } else {
            Self { temperature: 1.0, nll: plain.value, nll_scaled: plain.value, at_bound: false }
        }
    }
}

/// Mean NLL at an inverse temperature, with its two derivatives.
#[derive(Clone, Copy)]
struct Nll {
    value: f64,
    slope: f64,
    curvature: f64,
}

impl Nll {
    fn at(truth: &[u32], logits: &[Vec<f32>], inverse: f64) -> Self {
        let (mut value, mut slope, mut curvature) = (0.0, 0.0, 0.0);
        for (&label, logits) in truth.iter().zip(logits) {
            let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let (mut sum, mut first, mut second) = (0.0, 0.0, 0.0);
            for &logit in logits {
                let z = f64::from(logit) - f64::from(highest); // ≤ 0
                let weight = (inverse * z).exp();
                sum += weight;
                first += weight * z;
                second += weight * z * z;
            }
            let (mean, of_label) = (first / sum, f64::from(logits[label as usize]) - f64::from(highest));
            value += sum.ln() - inverse * of_label;
            slope += mean - of_label;
            curvature += (second / sum - mean * mean).max(0.0);
        }
        let rows = truth.len() as f64;
        Self { value: ratio(value, rows), slope: ratio(slope, rows), curvature: ratio(curvature, rows) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::metrics::{argmax, cross_entropy, softmax};

    /// Rows of `classes` whose labels are drawn from the softmax of their logits at `temperature`.
    fn drawn(rows: usize, classes: usize, temperature: f64) -> (Vec<u32>, Vec<Vec<f32>>) {
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        (0..rows)
            .map(|_| {
                let logits: Vec<f32> = (0..classes).map(|_| (6.0 * random() - 3.0) as f32).collect();
                let weights: Vec<f64> = logits.iter().map(|&z| (f64::from(z) / temperature).exp()).collect();
                let mut left = random() * weights.iter().sum::<f64>();
                let label = weights.iter().position(|weight| {
                    left -= weight;
                    left < 0.0
                });
                (label.unwrap_or(classes - 1) as u32, logits)
            })
            .unzip()
    }

    #[test]
    fn finds_the_temperature_that_labels_were_drawn_at() {
        for temperature in [0.4, 1.0, 2.5, 6.0] {
            let (truth, logits) = drawn(40_000, 5, temperature);
            let fitted = Temperature::fit(&truth, &logits);
            assert!((fitted.temperature / temperature - 1.0).abs() < 0.05, "{fitted:?} for {temperature}");
            assert!(!fitted.at_bound && fitted.nll_scaled <= fitted.nll, "{fitted:?}");
            // No other is better: to 1e-6 the least.
            let nll = |t: f64| Nll::at(&truth, &logits, 1.0 / t).value;
            for factor in [0.999, 1.001] {
                assert!(nll(fitted.temperature * factor) > fitted.nll_scaled);
            }
            assert!(Nll::at(&truth, &logits, 1.0 / fitted.temperature).slope.abs() < 1e-9);
            // What is confident as it should be has little error left.
            let calibration = Calibration::new(&truth, &logits, Some(fitted.temperature));
            assert!(calibration.ece_scaled.unwrap() < 0.02, "{calibration:?}");
            assert!(temperature == 1.0 || calibration.ece > 0.05, "{calibration:?}");
        }
    }

    #[test]
    fn ends_at_a_bound_where_nothing_is_best() {
        let right = vec![vec![2.0, 0.0], vec![0.0, 3.0]];
        let fitted = Temperature::fit(&[0, 1], &right);
        assert!((fitted.temperature - 0.05).abs() < 1e-12 && fitted.at_bound && fitted.nll_scaled < fitted.nll);
        let fitted = Temperature::fit(&[1, 0], &right);
        assert!((fitted.temperature - 20.0).abs() < 1e-12 && fitted.at_bound && fitted.nll_scaled < fitted.nll);
        // So far apart that NLL is 0 as it is.
        assert_eq!(Temperature::fit(&[0], &[vec![3e38, -3e38]]).temperature, 1.0);
        let flat = Temperature::fit(&[0, 1], &[vec![1.0, 1.0], vec![-4.0, -4.0]]);
        assert_eq!((flat.temperature, flat.at_bound), (1.0, false));
        assert_eq!(Temperature::fit(&[], &[]).temperature, 1.0);
    }

    #[test]
    fn the_error_of_few_rows_by_hand() {
        // Confidences 0.9, 0.9 and 0.9, two right; ½, right (the first of equals); 0.6, wrong.
        let logits = |confidence: f64| vec![(confidence / (1.0 - confidence)).ln() as f32, 0.0];
        let rows = [logits(0.9), logits(0.9), logits(0.9), vec![0.0, 0.0], logits(0.6)];
        let got = Calibration::new(&[0, 1, 0, 0, 1], &rows, None);
        let expected = (3.0 * (0.9 - 2.0 / 3.0) + (1.0 - 0.5) + 0.6) / 5.0;
        assert!((got.ece - expected).abs() < 1e-7, "{got:?}");
        assert_eq!((got.reliability.len(), got.ece_scaled), (15, None));
        let bins: Vec<_> = got.reliability.iter().enumerate().filter(|(_, bin)| bin.count > 0).collect();
        assert_eq!(bins.iter().map(|(i, bin)| (*i, bin.count)).collect::<Vec<_>>(), [(7, 1), (8, 1), (13, 3)]);
        assert_eq!((bins[0].1.confidence, bins[0].1.accuracy), (0.5, 1.0));
        assert_eq!((bins[0].1.lower, bins[0].1.upper), (7.0 / 15.0, 8.0 / 15.0));
    }

    /// As the definition says it: a bin's rows are looked for among all.
    fn plainly(truth: &[u32], logits: &[Vec<f32>]) -> f64 {
        let rows: Vec<(f64, bool)> = truth
            .iter()
            .zip(logits)
            .map(|(&label, logits)| {
                let predicted = argmax(logits).unwrap();
                (f64::from(softmax(logits, 1.0)[predicted as usize]), predicted == label)
            })
            .collect();
        let of_bin = |m: usize| {
            let inside = |p: f64| p > m as f64 / 15.0 && p <= (m + 1) as f64 / 15.0;
            let bin: Vec<_> = rows.iter().filter(|(p, _)| inside(*p)).collect();
            let (n, right) = (bin.len() as f64, bin.iter().filter(|(_, right)| *right).count() as f64);
            if n == 0.0 { 0.0 } else { (right - bin.iter().map(|(p, _)| p).sum::<f64>()).abs() }
        };
        (0..15).map(of_bin).sum::<f64>() / rows.len() as f64
    }

    fn rows() -> impl Strategy<Value = (Vec<u32>, Vec<Vec<f32>>)> {
        (2..6usize).prop_flat_map(|classes| {
            let row = (0..classes as u32, prop::collection::vec(-8f32..8.0, classes));
            prop::collection::vec(row, 1..80).prop_map(|rows| rows.into_iter().unzip())
        })
    }

    proptest! {
        #[test]
        fn the_error_is_its_definition_s((truth, logits) in rows()) {
            let got = Calibration::new(&truth, &logits, Some(1.0));
            prop_assert!((got.ece - plainly(&truth, &logits)).abs() < 1e-6, "{}", got.ece);
            prop_assert_eq!(got.ece_scaled, Some(got.ece));
            prop_assert_eq!(got.reliability.iter().map(|bin| bin.count).sum::<u64>(), truth.len() as u64);
        }

        #[test]
        fn the_fit_is_never_worse_than_nothing((truth, logits) in rows()) {
            let fitted = Temperature::fit(&truth, &logits);
            prop_assert!(fitted.nll_scaled <= fitted.nll);
            prop_assert!((BOUNDS[0]..=BOUNDS[1] + 1e-9).contains(&fitted.temperature));
            let mean = |t: f32| {
                let rows = truth.iter().zip(&logits);
                let scaled = |logits: &Vec<f32>| logits.iter().map(|z| z / t).collect::<Vec<f32>>();
                rows.map(|(&label, logits)| cross_entropy(&scaled(logits), label)).sum::<f64>() / truth.len() as f64
            };
            prop_assert!((mean(1.0) - fitted.nll).abs() < 1e-5);
            let least = (1..40).map(|i| mean(0.05 * 1.15f32.powi(i))).fold(f64::INFINITY, f64::min);
            prop_assert!(fitted.nll_scaled <= least + 1e-5, "{} {least}", fitted.nll_scaled);
        }
    }
}
