use std::fmt::Write;
use std::path::Path;

use unicode_width::UnicodeWidthStr;

use super::{Compared, Comparison, Pair, Verdict};
use crate::config::Metric;

/// A comparison as text: the models' figures on test, what is between every two, and where the rest is,
/// which is in `file`. It has no last newline.
pub fn comparison_table(comparison: &Comparison, file: &Path) -> String {
    let width = comparison.models.iter().map(|(name, _)| name.width()).max().unwrap_or(0).max(5);
    let pad = |name: &str| " ".repeat(width - name.width());
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{:width$} {:>8} {:>6} {:>6} {:>8}", "", "", "", "F1", "");
    text.truncate(text.trim_end().len());
    let _ = writeln!(
        text,
        "\n{:width$} {:>8} {:>6} {:>6} {:>8} {:>6} {:>6} {:>6} {:>6} {:>6}",
        "model", "accuracy", "macro", "micro", "weighted", "loss", "ECE", "rows/s", "MB", "train"
    );
    for (name, model) in &comparison.models {
        let _ = writeln!(text, "{name}{} {}", pad(name), figures(model));
    }
    for pair in &comparison.pairs {
        let _ = writeln!(text, "{}", between(pair));
    }
    let examples = comparison.models.first().map_or(0, |(_, model)| model.statistics.examples);
    let rows = comparison.disagreements.len();
    let _ = writeln!(text, "they disagree on {rows} of {examples} rows: {}", file.display());
    let figure = comparison.models.iter().find(|(name, _)| *name == comparison.best);
    let figure = figure.map_or(f64::NAN, |(_, model)| model.validation);
    let _ = write!(text, "best on validation: {} ({} {figure:.4})", comparison.best, name(comparison.objective.metric));
    text
}

fn figures(model: &Compared) -> String {
    let s = &model.statistics;
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "–".into());
    format!(
        "{:>8.4} {:>6.4} {:>6.4} {:>8.4} {:>6} {:>6} {:>6} {:>6} {:>6}",
        s.accuracy,
        s.macro_f1,
        s.micro_f1,
        s.weighted_f1,
        or_dash(s.loss.map(|loss| format!("{loss:.4}"))),
        or_dash(s.calibration.as_ref().map(|calibration| format!("{:.4}", calibration.ece))),
        or_dash(s.throughput.map(|t| short(t.examples_per_second))),
        short(model.bytes as f64 / 1e6),
        or_dash(s.training_seconds.map(duration)),
    )
}

/// A number in few columns: a decimal below 100.
pub(super) fn short(value: f64) -> String {
    if value < 99.95 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// `12.6m`
pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 99.95 => format!("{s:.1}s"),
        s if s < 5970.0 => format!("{:.1}m", s / 60.0),
        s => format!("{:.1}h", s / 3600.0),
    }
}

/// `minilm − distil: macro-F1 +0.0123 [−0.0040, +0.0290], McNemar p = 0.21: tie`
fn between(pair: &Pair) -> String {
    let Pair { a, b, f1_difference, interval: [low, high], mcnemar_p, verdict, .. } = pair;
    let verdict = match verdict {
        Verdict::A => format!("{a} is better"),
        Verdict::B => format!("{b} is better"),
        Verdict::Tie => "tie".into(),
    };
    let (difference, low, high) = (signed(*f1_difference), signed(*low), signed(*high));
    format!("{a} − {b}: macro-F1 {difference} [{low}, {high}], McNemar p {}: {verdict}", p_value(*mcnemar_p))
}

/// Four decimals with a sign, but 0 without.
pub(super) fn signed(value: f64) -> String {
    match format!("{:.4}", value.abs()) {
        zero if zero == "0.0000" => zero,
        digits if value < 0.0 => format!("−{digits}"),
        digits => format!("+{digits}"),
    }
}

/// `= 0.21`, `< 1e-6`
pub(super) fn p_value(p: f64) -> String {
    match p {
        p if p < 1e-6 => "< 1e-6".into(),
        p if p < 0.001 => format!("= {p:.0e}"),
        p if p < 0.0995 => format!("= {p:.3}"),
        p => format!("= {p:.2}"),
    }
}

/// As people write it.
pub(super) fn name(metric: Metric) -> &'static str {
    match metric {
        Metric::MacroF1 => "macro F1",
        Metric::Accuracy => "accuracy",
        Metric::MicroF1 => "micro F1",
        Metric::WeightedF1 => "weighted F1",
        Metric::Loss => "loss",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Goal, Objective};
    use crate::metrics::{Calibration, Throughput, statistics};

    fn model(name: &str, predicted: &[u32], measured: bool) -> (String, Compared) {
        let labels = ["no", "yes"].map(String::from);
        let mut statistics = statistics(&labels, &[0, 0, 1, 1], predicted, measured.then_some(0.25));
        if measured {
            statistics.calibration =
                Some(Calibration { ece: 0.0625, ece_scaled: None, temperature: None, reliability: vec![] });
            statistics.throughput = Some(Throughput::new(4, 40, 0.0012));
            statistics.training_seconds = Some(754.0);
        }
        let (run, model, bytes) = ("x/1".into(), name.into(), if measured { 91_234_567 } else { 438_000_000 });
        (name.into(), Compared { run, model, validation: 0.5, statistics, bytes })
    }

    #[test]
    fn columns_stand_under_their_names() {
        let pair = |interval: [f64; 2], mcnemar_p: f64| Pair {
            a: "minilm".into(),
            b: "日本".into(),
            f1_difference: (interval[0] + interval[1]) / 2.0,
            interval,
            mcnemar_p,
            verdict: Verdict::of(interval),
            only_a_correct: 1,
            only_b_correct: 0,
            disagreements: 1,
        };
        let comparison = Comparison {
            snapshot: "s".into(),
            objective: Objective { metric: Metric::MacroF1, goal: Goal::Max },
            models: vec![model("minilm", &[0, 0, 1, 1], true), model("日本", &[0, 0, 1, 0], false)],
            best: "minilm".into(),
            pairs: vec![
                pair([-0.004, 0.0286], 0.2101),
                pair([0.002, 0.0104], 0.0123),
                pair([-0.5, -0.25], 3.2e-5),
                pair([0.0, 0.0], 1.0),
            ],
            resamples: 1,
            confidence: 0.95,
            seed: 1,
            disagreements: vec![],
        };
        let json = serde_json::to_string(&comparison).unwrap();
        assert_eq!(serde_json::from_str::<Comparison>(&json).unwrap(), comparison);
        assert_eq!(
            format!("\n{}", comparison_table(&comparison, Path::new("runs/comparison.json"))),
            "
                           F1
model  accuracy  macro  micro weighted   loss    ECE rows/s     MB  train
minilm   1.0000 1.0000 1.0000   1.0000 0.2500 0.0625   3333   91.2  12.6m
日本     0.7500 0.7333 0.7500   0.7333      –      –      –    438      –
minilm − 日本: macro-F1 +0.0123 [−0.0040, +0.0286], McNemar p = 0.21: tie
minilm − 日本: macro-F1 +0.0062 [+0.0020, +0.0104], McNemar p = 0.012: minilm is better
minilm − 日本: macro-F1 −0.3750 [−0.5000, −0.2500], McNemar p = 3e-5: 日本 is better
minilm − 日本: macro-F1 0.0000 [0.0000, 0.0000], McNemar p = 1.00: tie
they disagree on 0 of 4 rows: runs/comparison.json
best on validation: minilm (macro F1 0.5000)"
        );
    }

    #[test]
    fn a_difference_of_which_the_interval_ends_at_zero_is_a_tie() {
        assert_eq!(Verdict::of([0.0, 0.1]), Verdict::Tie);
        assert_eq!(Verdict::of([-0.1, 0.0]), Verdict::Tie);
        assert_eq!(Verdict::of([1e-9, 0.1]), Verdict::A);
        assert_eq!(Verdict::of([-0.1, -1e-9]), Verdict::B);
    }
}
