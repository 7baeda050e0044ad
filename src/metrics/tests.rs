use std::path::Path;

use proptest::prelude::*;

use super::*;

fn names(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("l{i}")).collect()
}

/// What scikit-learn computed: tests/golden/make_metrics.py made the file.
#[derive(Deserialize)]
struct Golden {
    name: String,
    labels: usize,
    y_true: Vec<u32>,
    y_pred: Vec<u32>,
    accuracy: f64,
    macro_f1: f64,
    micro_f1: f64,
    weighted_f1: f64,
    per_label: Vec<GoldenLabel>,
}

#[derive(Deserialize)]
struct GoldenLabel {
    precision: f64,
    recall: f64,
    f1: f64,
    support: u64,
}

#[test]
fn equal_to_scikit_learn() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/metrics.json");
    let cases: Vec<Golden> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let names = names(case.labels);
        let got = statistics(&names, &case.y_true, &case.y_pred, None);
        let near = |what: &str, got: f64, want: f64| {
            assert!((got - want).abs() <= 1e-9, "{}: {what} {got}, sklearn {want}", case.name);
        };
        near("accuracy", got.accuracy, case.accuracy);
        near("macro_f1", got.macro_f1, case.macro_f1);
        near("micro_f1", got.micro_f1, case.micro_f1);
        near("weighted_f1", got.weighted_f1, case.weighted_f1);
        for (name, want) in names.iter().zip(&case.per_label) {
            let got = got.labels.iter().find(|l| l.label == *name).unwrap();
            near(name, got.precision, want.precision);
            near(name, got.recall, want.recall);
            near(name, got.f1, want.f1);
            assert_eq!(got.count, want.support, "{}: {name}", case.name);
        }
    }
}

#[test]
fn labels_come_by_f1_then_name() {
    let labels = ["b", "c", "a", "never"].map(String::from);
    let got = statistics(&labels, &[0, 0, 1, 2, 2], &[0, 2, 1, 2, 0], Some(0.5));
    let order: Vec<_> = got.labels.iter().map(|l| l.label.as_str()).collect();
    assert_eq!(order, ["c", "a", "b", "never"]);
    assert_eq!(got.labels[3].f1, 0.0);
    assert_eq!(got.get(Metric::Loss), 0.5);
}

#[test]
fn no_rows_are_zeros_not_nan() {
    let got = statistics(&names(2), &[], &[], None);
    assert_eq!((got.examples, got.accuracy, got.weighted_f1), (0, 0.0, 0.0));
    let json = serde_json::to_string(&got).unwrap();
    assert_eq!(serde_json::from_str::<Statistics>(&json).unwrap(), got);
}

#[test]
fn the_file_has_the_surface_s_fields_in_its_order() {
    let got = statistics(&names(1), &[0], &[0], None);
    assert_eq!(
        serde_json::to_string(&got).unwrap(),
        r#"{"examples":1,"accuracy":1.0,"macro_f1":1.0,"micro_f1":1.0,"weighted_f1":1.0,"loss":null,"labels":[{"label":"l0","count":1,"correct":1,"precision":1.0,"recall":1.0,"f1":1.0,"accuracy":1.0}]}"#
    );
}

#[test]
fn a_judged_model_has_loss_and_calibration_in_the_same_object() {
    let logits = vec![vec![2.0, 0.0], vec![0.0, 1.0], vec![3.0, 0.0]];
    let (predicted, got) = judge(&names(2), &[0, 1, 1], &logits, Some(2.0)).unwrap();
    assert_eq!(predicted, [0, 1, 0]);
    let loss = logits.iter().zip([0, 1, 1]).map(|(logits, label)| cross_entropy(logits, label)).sum::<f64>() / 3.0;
    assert!((got.loss.unwrap() - loss).abs() < 1e-12);
    let json = serde_json::to_value(&got).unwrap();
    assert_eq!((&json["temperature"], json["reliability"].as_array().unwrap().len()), (&2.0.into(), 15));
    assert!(json["ece"].as_f64().unwrap() > 0.0 && json["ece_scaled"] != json["ece"], "{json}");
    assert_eq!(serde_json::from_value::<Statistics>(json).unwrap(), got);

    let error = judge(&names(2), &[0, 1], &[vec![0.0, 1.0], vec![f32::NAN, 0.0]], None).unwrap_err();
    assert!(format!("{error:#}").starts_with("logits of row 1: "), "{error:#}");
}

#[test]
fn argmax_takes_the_first_of_equals_and_refuses_nan() {
    assert_eq!(argmax(&[0.0, 2.0, 2.0]).unwrap(), 1);
    assert_eq!(argmax(&[f32::NEG_INFINITY; 2]).unwrap(), 0);
    assert!(argmax(&[]).is_err());
    for nan_at in 0..3 {
        let mut logits = [1.0; 3];
        logits[nan_at] = f32::NAN;
        let error = argmax(&logits).unwrap_err().to_string();
        assert!(error.contains(&format!("class {nan_at}")), "{error}");
    }
}

#[test]
fn softmax_does_not_overflow() {
    assert_eq!(softmax(&[1e30, -1e30], 1.0), [1.0, 0.0]);
    assert_eq!(softmax(&[-3e38, -3e38], 1.0), [0.5, 0.5]);
    assert!((softmax(&[1.0, 0.0], 1.0)[0] - 0.731_058_6).abs() < 1e-7);
    assert_eq!(softmax(&[1.0, 0.0], 0.5), softmax(&[2.0, 0.0], 1.0));
}

/// Some rows of up to 6 classes: the truth and the prediction of each.
fn rows() -> impl Strategy<Value = (usize, Vec<(u32, u32)>)> {
    (1..7usize).prop_flat_map(|n| {
        let id = 0..n as u32;
        (Just(n), prop::collection::vec((id.clone(), id), 0..60))
    })
}

proptest! {
    #[test]
    fn lies_between_zero_and_one_and_agrees_with_the_matrix((n, rows) in rows()) {
        let (truth, predicted): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        let got = statistics(&names(n), &truth, &predicted, None);
        let matrix = confusion(n, &truth, &predicted);
        for value in [got.accuracy, got.macro_f1, got.weighted_f1] {
            prop_assert!((0.0..=1.0 + 1e-12).contains(&value));
        }
        // Micro F1 from its definition: 2 TP / (2 TP + FP + FN), summed over the labels.
        let (mut hits, mut claims, mut count) = (0, 0, 0);
        for l in &got.labels {
            let id: usize = l.label[1..].parse().unwrap();
            prop_assert_eq!(l.count, matrix.row(id).iter().sum::<u64>());
            prop_assert_eq!(l.correct, matrix.get(id, id));
            let claimed = (0..n).map(|truth| matrix.get(truth, id)).sum::<u64>();
            prop_assert!((l.precision * claimed as f64 - l.correct as f64).abs() < 1e-9);
            prop_assert!(l.f1 <= l.precision.max(l.recall) + 1e-12);
            hits += l.correct;
            claims += claimed;
            count += l.count;
        }
        let micro = if count == 0 { 0.0 } else { (2 * hits) as f64 / (claims + count) as f64 };
        prop_assert!((got.micro_f1 - micro).abs() < 1e-12);
    }

    #[test]
    fn neither_the_rows_order_nor_the_ids_matter((n, rows) in rows(), shift in 0..6u32) {
        let (truth, predicted): (Vec<_>, Vec<_>) = rows.iter().copied().unzip();
        let want = statistics(&names(n), &truth, &predicted, None);

        let (truth, predicted): (Vec<_>, Vec<_>) = rows
            .iter()
            .rev()
            .map(|&(t, p)| ((t + shift) % n as u32, (p + shift) % n as u32))
            .unzip();
        let mut shifted = names(n);
        shifted.rotate_right(shift as usize % n);
        let got = statistics(&shifted, &truth, &predicted, None);
        prop_assert_eq!(&got.labels, &want.labels);
        prop_assert!((got.macro_f1 - want.macro_f1).abs() < 1e-12);
        prop_assert!((got.weighted_f1 - want.weighted_f1).abs() < 1e-12);
    }

    #[test]
    fn probabilities_sum_to_one(logits in prop::collection::vec(-80f32..80.0, 1..20)) {
        let probabilities = softmax(&logits, 1.0);
        let sum: f32 = probabilities.iter().sum();
        prop_assert!((sum - 1.0).abs() < 1e-5);
        let best = argmax(&logits).unwrap() as usize;
        prop_assert!(probabilities.iter().all(|&p| p <= probabilities[best]));
    }
}

#[test]
fn cross_entropy_is_minus_log_softmax() {
    assert!((cross_entropy(&[1.0, 2.0, 3.0], 2) - 0.407_605_964_444_38).abs() < 1e-12);
    assert_eq!(cross_entropy(&[1e4, 0.0], 1), 1e4);
}
