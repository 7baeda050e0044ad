//! Class weights.

use anyhow::Result;

use crate::config::ClassWeights;
use crate::user_error;

/// The weight of each label, by id; `None` where all weigh the same.
///
/// `balanced` is scikit-learn's: examples / (labels · count).
///
/// # Errors
/// Weights given for labels that the data does not have, or missing for one that it has.
pub fn class_weights(weights: &ClassWeights, labels: &[String], counts: &[u64]) -> Result<Option<Vec<f32>>> {
    match weights {
        ClassWeights::None => Ok(None),
        ClassWeights::Balanced => {
            let examples: u64 = counts.iter().sum();
            let weight = |&count: &u64| (examples as f64 / (labels.len() as f64 * count.max(1) as f64)) as f32;
            Ok(Some(counts.iter().map(weight).collect()))
        }
        ClassWeights::Given(table) => {
            if let Some(unknown) = table.keys().find(|key| !labels.contains(key)) {
                return Err(user_error!(
                    "train.class_weights: the data has no label {unknown:?}; it has {}",
                    labels.join(", ")
                ));
            }
            let weight = |label: &String| {
                table.get(label).map(|&weight| weight as f32).ok_or_else(|| {
                    user_error!("train.class_weights: label {label:?} has no weight; give every label one")
                })
            };
            labels.iter().map(weight).collect::<Result<_>>().map(Some)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balanced_weights_are_scikit_learns() {
        let labels = ["a", "b", "c"].map(String::from);
        // sklearn.utils.class_weight.compute_class_weight("balanced", …) of 6, 3 and 1 rows
        let weights = class_weights(&ClassWeights::Balanced, &labels, &[6, 3, 1]).unwrap().unwrap();
        assert_eq!(weights, [10.0 / 18.0, 10.0 / 9.0, 10.0 / 3.0].map(|w: f64| w as f32));
    }

    #[test]
    fn weights_name_the_label_that_is_wrong() {
        let labels = ["a", "b"].map(String::from);
        let given = |keys: &[&str]| ClassWeights::Given(keys.iter().map(|k| (k.to_string(), 1.0)).collect());
        let error = |keys| class_weights(&given(keys), &labels, &[1, 1]).unwrap_err().to_string();
        assert_eq!(error(&["a", "c"]), "train.class_weights: the data has no label \"c\"; it has a, b");
        assert_eq!(error(&["a"]), "train.class_weights: label \"b\" has no weight; give every label one");
    }
}
