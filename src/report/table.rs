use std::fmt::Write;

use unicode_width::UnicodeWidthStr;

use super::shorten;
use crate::metrics::Statistics;

/// The widest that a label is printed, in columns.
const LABEL_COLUMNS: usize = 40;

/// The statistics as text: a line for each label, the best F1 first, and one with the totals.
///
/// It holds no colour and no terminal's width, so that a pipe gets what a terminal shows. Columns
/// are aligned by what a terminal shows of a label, not by its bytes.
pub fn table(statistics: &Statistics) -> String {
    let labels: Vec<_> = statistics.labels.iter().map(|l| shorten(&l.label, LABEL_COLUMNS)).collect();
    let width = labels.iter().map(|l| l.width()).max().unwrap_or(0).max(5);

    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{:width$}  {:>8}  {:>8}  {:>9}  {:>6}  {:>6}",
        "label", "count", "correct", "precision", "recall", "f1"
    );
    for (label, l) in labels.iter().zip(&statistics.labels) {
        let pad = " ".repeat(width - label.width());
        let _ = writeln!(
            text,
            "{label}{pad}  {:>8}  {:>8}  {:>9.4}  {:>6.4}  {:>6.4}",
            l.count, l.correct, l.precision, l.recall, l.f1
        );
    }
    let _ = write!(
        text,
        "examples={} accuracy={:.4} macro_f1={:.4} micro_f1={:.4} weighted_f1={:.4}",
        statistics.examples, statistics.accuracy, statistics.macro_f1, statistics.micro_f1, statistics.weighted_f1,
    );
    if let Some(loss) = statistics.loss {
        let _ = write!(text, " loss={loss:.4}");
    }
    if let Some(throughput) = statistics.throughput {
        let _ = write!(text, " examples_per_second={:.1}", throughput.examples_per_second);
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::statistics;

    #[test]
    fn columns_stand_under_their_names() {
        let labels = ["sport", "日本語", "a label that goes on and on and on and on\nand on"];
        let labels = labels.map(String::from);
        let text = table(&statistics(&labels, &[0, 0, 1, 2], &[0, 1, 1, 2], Some(0.25)));
        assert_eq!(
            text,
            "\
label                                       count   correct  precision  recall      f1
a label that goes on and on and on and…         1         1     1.0000  1.0000  1.0000
sport                                           2         1     1.0000  0.5000  0.6667
日本語                                          1         1     0.5000  1.0000  0.6667
examples=4 accuracy=0.7500 macro_f1=0.7778 micro_f1=0.7500 weighted_f1=0.7500 loss=0.2500
"
        );
    }

    #[test]
    fn a_wide_character_is_not_cut_in_half() {
        assert_eq!(shorten("日本語日本語", 6), "日本…");
        assert_eq!(shorten("日本語", 6), "日本語");
        assert_eq!(shorten("e\u{301}e\u{301}", 2), "e\u{301}e\u{301}");
    }
}
