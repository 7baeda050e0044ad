//! The data card: what is in a snapshot or an encoding, for the person who decides on `max_length`,
//! class weights and whether to trust the split.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::count;
use super::split::Duplicates;

/// card.json of a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// By part: its rows, labels and lengths.
    pub parts: BTreeMap<String, PartCard>,
    /// Rows that were dropped, and texts with more than one label.
    pub duplicates: Duplicates,
}

/// One part of a [`Card`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartCard {
    /// Rows.
    pub rows: usize,
    /// Rows by label; every label of the snapshot is named.
    pub labels: serde_json::Map<String, serde_json::Value>,
    /// Words (between white space) in a row, both texts of a pair together.
    pub words: Lengths,
}

/// card.json of one part of an encoding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EncodingCard {
    /// Rows.
    pub rows: usize,
    /// SHA-256 of the Arrow file.
    pub sha256: String,
    /// The tokenizer's hash.
    pub tokenizer: String,
    /// Tokens kept of a row, special tokens included.
    pub max_length: usize,
    /// The columns, in the model's input order.
    pub inputs: Vec<String>,
    /// Tokens in a row before truncation, special tokens included.
    pub tokens: Lengths,
    /// Rows that were longer than `max_length`.
    pub truncated: usize,
}

/// Percentiles by nearest rank: each is a length that occurs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lengths {
    /// 5% are at most this long.
    pub p5: usize,
    /// The median.
    pub p50: usize,
    /// 95% are at most this long.
    pub p95: usize,
    /// 99% are at most this long.
    pub p99: usize,
    /// The longest.
    pub max: usize,
    /// The mean.
    pub mean: f64,
}

impl Lengths {
    /// Of any number of lengths; of none all are 0.
    pub fn new(mut lengths: Vec<usize>) -> Self {
        if lengths.is_empty() {
            return Self::default();
        }
        lengths.sort_unstable();
        let n = lengths.len();
        let rank = |percent: usize| lengths[(percent * n).div_ceil(100) - 1];
        let mean = lengths.iter().sum::<usize>() as f64 / n as f64;
        Self { p5: rank(5), p50: rank(50), p95: rank(95), p99: rank(99), max: lengths[n - 1], mean }
    }
}

impl Card {
    /// What the user should hear of the data, a line each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let d = &self.duplicates;
        if d.repeated + d.held_out > 0 {
            warnings.push(format!(
                "{} dropped as exact duplicates: {} of an earlier row, {} of a held-out row",
                count(d.repeated + d.held_out, "row"),
                d.repeated,
                d.held_out
            ));
        }
        if !d.conflicts.is_empty() {
            const SHOWN: usize = 2;
            let shown: Vec<String> = d
                .conflicts
                .iter()
                .take(SHOWN)
                .map(|conflict| {
                    let rows: Vec<String> =
                        conflict.rows.iter().map(|row| format!("{} {:?}", row.place, row.label)).collect();
                    rows.join(" and ")
                })
                .collect();
            let more = if d.conflicts.len() > SHOWN { "; …, all in card.json" } else { "" };
            warnings.push(format!(
                "{} with more than one label, {} dropped from training: {}{more}",
                count(d.conflicts.len(), "text"),
                count(d.conflicting, "row"),
                shown.join("; ")
            ));
        }
        for (name, part) in &self.parts {
            let absent: Vec<&str> =
                part.labels.iter().filter(|(_, rows)| *rows == 0).map(|(label, _)| label.as_str()).collect();
            if !absent.is_empty() {
                warnings.push(format!(
                    "{} without a row in {name}: {}",
                    count(absent.len(), "label"),
                    absent.join(", ")
                ));
            }
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let lengths = Lengths::new((1..=20).rev().collect());
        assert_eq!(lengths, Lengths { p5: 1, p50: 10, p95: 19, p99: 20, max: 20, mean: 10.5 });
        assert_eq!(Lengths::new(vec![7]), Lengths { p5: 7, p50: 7, p95: 7, p99: 7, max: 7, mean: 7.0 });
        assert_eq!(Lengths::new(vec![]), Lengths::default());
    }
}
