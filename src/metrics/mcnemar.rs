//! McNemar's exact test: do two classifiers that saw the same rows err equally often?
//!
//! Rows that both have right, or both wrong, say nothing of that. Of the others, as many as coin tosses
//! would let either win, if the two were equally good (McNemar 1947; exact as in Dietterich 1998, §3.1).

/// The two-sided p-value for `only_a` rows that only the first classifier has right, and `only_b` that
/// only the second has: the chance of a split at least as uneven, under Binomial(only_a + only_b, ½).
/// Without a row that tells them apart it is 1.
///
/// Below 1e-290 it may come out as 0.
pub fn mcnemar(only_a: u64, only_b: u64) -> f64 {
    let (n, fewer) = (only_a + only_b, only_a.min(only_b));
    // Binomial coefficients by their ratios, from the middle one, which counts as 1, outwards, and over
    // their own sum: nothing overflows for any n, and what underflows is too small to matter.
    let (mut all, mut tail) = (0.0, 0.0);
    let (mut k, mut weight) = (n / 2, 1.0);
    while weight > f64::MIN_POSITIVE {
        // Both halves; the middle of an even n is in none.
        all += if 2 * k == n { weight } else { 2.0 * weight };
        if k <= fewer {
            tail += 2.0 * weight;
        }
        if k == 0 {
            break;
        }
        weight *= k as f64 / (n - k + 1) as f64; // C(n, k − 1) / C(n, k)
        k -= 1;
    }
    (tail / all).min(1.0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    /// What SciPy computed: tests/golden/make_mcnemar.py made the file.
    #[test]
    fn equal_to_scipy_s_binomial_test() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/mcnemar.json");
        let cases: Vec<(u64, u64, f64)> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(cases.len() > 30, "{} cases", cases.len());
        for (a, b, expected) in cases {
            let p = mcnemar(a, b);
            // SciPy's own figures are exact to some 1e-12 of themselves.
            assert!((p - expected).abs() <= 1e-9 * expected + 1e-300, "mcnemar({a}, {b}) = {p}, SciPy {expected}");
        }
    }

    #[test]
    fn what_can_be_counted_by_hand() {
        assert_eq!(mcnemar(0, 0), 1.0);
        assert_eq!(mcnemar(1, 0), 1.0);
        assert_eq!(mcnemar(0, 2), 0.5);
        assert_eq!(mcnemar(5, 5), 1.0);
        assert!((mcnemar(0, 10) - 2.0 / 1024.0).abs() < 1e-15);
        assert!((mcnemar(1, 9) - 22.0 / 1024.0).abs() < 1e-15);
    }

    #[test]
    fn so_many_rows_that_two_to_their_number_is_no_float() {
        assert_eq!(mcnemar(50_000_000, 50_000_000), 1.0);
        // One toss less than half: all but the middle term, √(2 / πn) of the whole (Stirling).
        let n = 1e8f64;
        let middle = (2.0 / (std::f64::consts::PI * n)).sqrt() * (1.0 - 0.25 / n);
        assert!((mcnemar(49_999_999, 50_000_001) - (1.0 - middle)).abs() < 1e-9);
        assert_eq!(mcnemar(0, 1_000_000), 0.0);
    }

    proptest! {
        #[test]
        fn is_a_probability_the_same_both_ways_and_less_for_a_more_uneven_split(a in 0u64..3000, b in 0u64..3000) {
            let p = mcnemar(a, b);
            prop_assert!((0.0..=1.0).contains(&p));
            prop_assert_eq!(p, mcnemar(b, a));
            if a > b && b > 0 {
                prop_assert!(mcnemar(a + 1, b - 1) <= p);
            }
        }
    }
}
