use std::collections::BTreeMap;

use maud::{Markup, html};

use super::{figure, label};
use crate::metrics::{LabelStatistics, Statistics};

/// Each label's figures, the best F1 first; a script sorts them by any column.
pub fn section(statistics: &Statistics, part: &str, validation: Option<&Statistics>) -> Markup {
    let validation: Option<BTreeMap<&str, f64>> =
        validation.map(|statistics| statistics.labels.iter().map(|l| (l.label.as_str(), l.f1)).collect());
    let mut columns = vec!["rows", "correct", "precision", "recall", "F1"];
    columns.extend(validation.as_ref().map(|_| "F1 on validation"));
    html! {
        h3 { "Labels" }
        div.scroll tabindex="0" role="region" aria-label="Figures of each label" {
            table.sortable {
                caption { (statistics.labels.len()) " labels on the " (part) " part." }
                thead {
                    tr {
                        th scope="col" { "label" }
                        @for name in columns {
                            th.number scope="col" aria-sort=[(name == "F1").then_some("descending")] { (name) }
                        }
                    }
                }
                tbody {
                    @for l in &statistics.labels { (row(l, validation.as_ref())) }
                }
            }
        }
    }
}

/// `data-value` is what the script sorts by: digits that are not shown count too.
fn row(l: &LabelStatistics, validation: Option<&BTreeMap<&str, f64>>) -> Markup {
    html! {
        tr {
            th scope="row" { (label(&l.label)) }
            td.number data-value=(l.count) { (l.count) }
            td.number data-value=(l.correct) { (l.correct) }
            td.number data-value=(l.precision) { (figure(l.precision)) }
            td.number data-value=(l.recall) { (figure(l.recall)) }
            td.number.bar data-value=(l.f1) style={ "--share:" (format!("{:.3}", l.f1)) } { (figure(l.f1)) }
            @if let Some(f1) = validation.map(|of| of.get(l.label.as_str())) {
                td.number data-value=[f1] { @if let Some(&f1) = f1 { (figure(f1)) } }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::statistics;

    #[test]
    fn each_cell_carries_what_it_is_sorted_by() {
        let labels = ["a", "<b>"].map(String::from);
        let statistics = statistics(&labels, &[0, 0, 0, 1], &[0, 0, 1, 1], None);
        let page = section(&statistics, "test", Some(&statistics)).into_string();
        assert!(page.contains(r#"<th class="number" scope="col" aria-sort="descending">F1</th>"#), "{page}");
        assert!(page.contains(r#"<td class="number" data-value="0.6666666666666666">0.6667</td>"#), "{page}");
        assert!(
            page.contains(r#"<th scope="row"><bdi>&lt;b&gt;</bdi></th><td class="number" data-value="1">1</td>"#),
            "{page}"
        );
        assert_eq!(page.matches("aria-sort").count(), 1);
        assert_eq!(page.matches("data-value").count(), 12);
        assert!(!section(&statistics, "validation", None).into_string().contains("F1 on validation"));
    }
}
