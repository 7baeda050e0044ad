//! How far the difference of two models' macro F1 would move, had other rows been drawn.
//!
//! The paired bootstrap (Efron and Tibshirani 1993, §13.3; Koehn 2004 for paired systems): rows are drawn
//! with replacement, as many as there are, and both models are judged on the same drawn rows, so that
//! what is hard for both takes no part. The interval is the percentile one.

use rayon::prelude::*;

use super::ratio;

/// Resamples that [`paired_bootstrap`] takes where nothing says otherwise: the ends of a 95 % interval
/// then move by some 2 % of its width from one seed to another.
pub const RESAMPLES: u32 = 10_000;

/// The share of resamples that lie between an interval's ends.
pub const CONFIDENCE: f64 = 0.95;

/// The labels of some rows, and what two models predicted for them.
#[derive(Clone, Copy, Debug)]
pub struct Paired<'a> {
    /// Number of classes.
    pub classes: usize,
    /// Each row's class.
    pub truth: &'a [u32],
    /// What the first model predicted.
    pub a: &'a [u32],
    /// What the second model predicted.
    pub b: &'a [u32],
}

/// The 95 % percentile interval of macro F1 of `a` minus that of `b`, over paired resamples of the rows:
/// the 2.5 % and the 97.5 % quantile, linear between neighbours as NumPy's.
///
/// It depends on the rows and on `seed` alone, not on the threads. Macro F1 is as in
/// [`statistics`](super::statistics): a class that a resample holds no row of, and that the model
/// predicts for none, has F1 0. Without rows it is `[0, 0]`.
///
/// # Panics
/// Where the three lists differ in length or hold a class that is not below `classes`.
pub fn paired_bootstrap(rows: Paired<'_>, resamples: u32, seed: u64) -> [f64; 2] {
    let Paired { classes, truth, a, b } = rows;
    assert!(truth.len() == a.len() && truth.len() == b.len(), "two predictions for each row");
    let mut differences: Vec<f64> = (0..resamples)
        .into_par_iter()
        .map_init(
            || [Counts::new(classes), Counts::new(classes)],
            |[of_a, of_b], resample| {
                of_a.clear();
                of_b.clear();
                for row in Draws::new(seed, resample, truth.len()) {
                    of_a.add(truth[row], a[row]);
                    of_b.add(truth[row], b[row]);
                }
                of_a.macro_f1() - of_b.macro_f1()
            },
        )
        .collect();
    differences.sort_unstable_by(f64::total_cmp);
    let outside = (1.0 - CONFIDENCE) / 2.0;
    [quantile(&differences, outside), quantile(&differences, 1.0 - outside)]
}

/// All that F1 needs of a confusion matrix: its margins and its diagonal.
struct Counts {
    /// Of each class: rows of it and rows predicted as it, together; rows that are both.
    classes: Vec<(u32, u32)>,
}

impl Counts {
    fn new(classes: usize) -> Self {
        Self { classes: vec![(0, 0); classes] }
    }

    fn clear(&mut self) {
        self.classes.fill((0, 0));
    }

    fn add(&mut self, truth: u32, predicted: u32) {
        let class = &mut self.classes[truth as usize];
        class.0 += 1;
        class.1 += u32::from(truth == predicted);
        self.classes[predicted as usize].0 += 1;
    }

    fn macro_f1(&self) -> f64 {
        let f1 = |&(margins, hits): &(u32, u32)| ratio(2.0 * f64::from(hits), f64::from(margins));
        ratio(self.classes.iter().map(f1).sum(), self.classes.len() as f64)
    }
}

/// The rows of one resample, drawn with replacement: `rows` numbers below `rows`.
struct Draws {
    state: u64,
    rows: usize,
    left: usize,
}

impl Draws {
    fn new(seed: u64, resample: u32, rows: usize) -> Self {
        let state = mix(mix(seed).wrapping_add(u64::from(resample)));
        Self { state, rows, left: rows }
    }
}

impl Iterator for Draws {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.left = self.left.checked_sub(1)?;
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // Lemire 2019: 64 random bits as a fraction of the rows; what is uneven is below rows / 2⁶⁴.
        Some(((u128::from(mix(self.state)) * self.rows as u128) >> 64) as usize)
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The value below which a `share` of the ascending `sorted` lies; 0 of none.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * sorted.len().saturating_sub(1) as f64;
    let value = |i: usize| sorted.get(i.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0);
    let (low, high) = (value(at.floor() as usize), value(at.ceil() as usize));
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::statistics;

    /// Random rows: of `classes`, of which each model has about the given share right.
    fn rows(classes: u32, rows: usize, right: [f64; 2], seed: u64) -> [Vec<u32>; 3] {
        let mut state = mix(seed + 1);
        let mut random = move |below: u32| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            (mix(state) % u64::from(below)) as u32
        };
        let truth: Vec<u32> = (0..rows).map(|_| random(classes)).collect();
        let [a, b] = right.map(|right| {
            let mut predict = |&t: &u32| if f64::from(random(1000)) < 1000.0 * right { t } else { random(classes) };
            truth.iter().map(&mut predict).collect()
        });
        [truth, a, b]
    }

    fn paired<'a>(classes: u32, [truth, a, b]: &'a [Vec<u32>; 3]) -> Paired<'a> {
        Paired { classes: classes as usize, truth, a, b }
    }

    /// The same resamples through [`statistics`], one by one.
    fn slowly(rows: Paired<'_>, resamples: u32, seed: u64) -> [f64; 2] {
        let labels: Vec<String> = (0..rows.classes).map(|i| i.to_string()).collect();
        let mut differences: Vec<f64> = (0..resamples)
            .map(|resample| {
                let drawn: Vec<usize> = Draws::new(seed, resample, rows.truth.len()).collect();
                let of = |all: &[u32]| drawn.iter().map(|&row| all[row]).collect::<Vec<u32>>();
                let f1 = |predicted| statistics(&labels, &of(rows.truth), &of(predicted), None).macro_f1;
                f1(rows.a) - f1(rows.b)
            })
            .collect();
        differences.sort_by(f64::total_cmp);
        [quantile(&differences, 0.025), quantile(&differences, 0.975)]
    }

    #[test]
    fn equal_to_a_plain_twin() {
        // Of the last, most resamples lack classes: their F1 is 0 in both.
        for (classes, n, right) in [(2, 30, [0.8, 0.6]), (7, 300, [0.9, 0.9]), (52, 40, [0.7, 0.5])] {
            let rows = rows(classes, n, right, 3);
            let (fast, plain) =
                (paired_bootstrap(paired(classes, &rows), 400, 9), slowly(paired(classes, &rows), 400, 9));
            assert!(fast.iter().zip(plain).all(|(fast, plain)| (fast - plain).abs() < 1e-12), "{fast:?} {plain:?}");
            assert!(fast[0] < fast[1], "{fast:?}");
        }
    }

    #[test]
    fn depends_on_the_seed_and_not_on_the_threads() {
        let rows = rows(5, 200, [0.8, 0.75], 1);
        let bootstrap = |threads: usize, seed: u64| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| paired_bootstrap(paired(5, &rows), 500, seed))
        };
        assert_eq!(bootstrap(1, 7), bootstrap(3, 7));
        assert_ne!(bootstrap(1, 7), bootstrap(1, 8));
    }

    #[test]
    fn models_that_say_the_same_differ_by_nothing() {
        let [truth, a, _] = rows(4, 100, [0.7, 0.0], 5);
        assert_eq!(paired_bootstrap(Paired { classes: 4, truth: &truth, a: &a, b: &a }, 100, 1), [0.0, 0.0]);
        assert_eq!(paired_bootstrap(Paired { classes: 4, truth: &[], a: &[], b: &[] }, 100, 1), [0.0, 0.0]);
        assert_eq!(paired_bootstrap(Paired { classes: 4, truth: &truth, a: &a, b: &a }, 0, 1), [0.0, 0.0]);
        // Right against wrong in all rows: no resample says otherwise.
        let wrong: Vec<u32> = truth.iter().map(|t| (t + 1) % 4).collect();
        assert_eq!(paired_bootstrap(Paired { classes: 4, truth: &truth, a: &truth, b: &wrong }, 100, 1), [1.0, 1.0]);
    }

    #[test]
    fn every_row_is_drawn_alike() {
        let mut counts = [0u32; 7];
        for resample in 0..10_000 {
            Draws::new(42, resample, 7).for_each(|row| counts[row] += 1);
        }
        // 70,000 draws: the standard deviation of each count is 93.
        assert!(counts.iter().all(|&count| count.abs_diff(10_000) < 500), "{counts:?}");
    }

    /// Of the intervals of many experiments, 95 % hold the true difference, which is that of all rows.
    #[test]
    fn intervals_hold_the_true_difference_as_often_as_they_say() {
        let all = rows(4, 200_000, [0.85, 0.75], 11);
        let labels: Vec<String> = (0..4).map(|i| i.to_string()).collect();
        let f1 = |predicted: &Vec<u32>| statistics(&labels, &all[0], predicted, None).macro_f1;
        let difference = f1(&all[1]) - f1(&all[2]);
        let held = (0..500).filter(|experiment| {
            let part = all.each_ref().map(|list| list[400 * experiment..][..400].to_vec());
            let [low, high] = paired_bootstrap(paired(4, &part), 400, 1);
            low <= difference && difference <= high
        });
        let held = held.count();
        // 475 are expected, with a standard deviation of 5.
        assert!((455..=492).contains(&held), "{held} of 500");
    }

    #[test]
    fn a_quantile_is_linear_between_neighbours() {
        let sorted = [0.0, 1.0, 2.0, 4.0];
        assert_eq!([0.0, 0.5, 0.75, 1.0].map(|share| quantile(&sorted, share)), [0.0, 1.5, 2.5, 4.0]);
    }
}
