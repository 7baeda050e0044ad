use std::collections::BTreeMap;

use maud::{Markup, html};

use super::{Found, absent, label, plain};
use crate::metrics;
use crate::report::Predicted;
use crate::report::confusion::shown_classes;

/// Up to this many classes, cells have room for a share under the count.
const ROOMY: usize = 12;

/// What each label was taken for: a table whose shades are shares of the row.
pub fn section(predictions: &Found<Vec<Predicted>>) -> Markup {
    let rows = match predictions {
        Ok(rows) => rows,
        Err(why) => return absent("Confusion", why),
    };
    let labelled = || rows.iter().filter_map(|row| Some((row.label.as_deref()?, row.prediction.as_str())));
    let mut ids: BTreeMap<&str, u32> = labelled().flat_map(|(truth, predicted)| [(truth, 0), (predicted, 0)]).collect();
    for (id, at) in (0..).zip(ids.values_mut()) {
        *at = id;
    }
    let names: Vec<&str> = ids.keys().copied().collect();
    let (truth, predicted): (Vec<u32>, Vec<u32>) = labelled().map(|(a, b)| (ids[a], ids[b])).unzip();
    let matrix = metrics::confusion(names.len(), &truth, &predicted);
    let shown = shown_classes(&matrix);
    let roomy = shown.len() <= ROOMY;
    html! {
        h3 { "Confusion" }
        div.scroll tabindex="0" role="region" aria-label="Confusion matrix" {
            table.confusion.roomy[roomy].dense[shown.len() > 24] {
                caption {
                    "Each row is a true label, each column what was predicted; the shade is the share of the row."
                    @if shown.len() < names.len() {
                        " Of " (names.len()) " labels, the " (shown.len()) " with the most mistakes."
                    }
                }
                thead {
                    tr {
                        td {}
                        @for &id in &shown { th scope="col" { span { (label(names[id])) } } }
                    }
                }
                tbody {
                    @for &truth in &shown {
                        @let total: u64 = matrix.row(truth).iter().sum();
                        tr {
                            th scope="row" { (label(names[truth])) }
                            @for &predicted in &shown {
                                (cell(matrix.get(truth, predicted), total, roomy, names[truth], names[predicted]))
                            }
                        }
                    }
                }
            }
        }
    }
}

fn cell(count: u64, total: u64, roomy: bool, truth: &str, predicted: &str) -> Markup {
    if count == 0 {
        return html! { td {} };
    }
    let share = count as f64 / total as f64;
    // One mistake of many rows has some colour too.
    let shade = ((share * 10.0).round() as u32).max(1);
    html! {
        td class={ "s" (shade) } title={ (plain(truth)) " → " (plain(predicted)) ": " (count) " of " (total) } {
            (count) @if roomy { small { (format!("{:.0} %", share * 100.0)) } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_true_labels_and_shades_their_shares() {
        let row = |label: &str, prediction: &str| Predicted {
            id: "0".into(),
            label: Some(label.into()),
            prediction: prediction.into(),
            probabilities: vec![],
        };
        let rows = vec![row("b", "a"), row("b", "b"), row("b", "b"), row("b", "b"), row("<a>", "b")];
        let page = section(&Ok(rows)).into_string();
        assert!(page.contains(r#"<td class="s3" title="b → a: 1 of 4">1<small>25 %</small></td>"#), "{page}");
        assert!(page.contains(r#"<td class="s10" title="&lt;a&gt; → b: 1 of 1">"#), "{page}");
        assert!(
            page.contains(r#"<th scope="row"><bdi>&lt;a&gt;</bdi></th><td></td><td></td><td class="s10""#),
            "{page}"
        );
    }

    #[test]
    fn many_labels_are_dense_and_too_many_cut() {
        for (labels, expected) in [(5, "confusion roomy\""), (52, "confusion dense\""), (90, "the 64 with the most")] {
            let rows = (0..labels).map(|i| Predicted {
                id: i.to_string(),
                label: Some(format!("l{i}")),
                prediction: "l0".into(),
                probabilities: vec![],
            });
            let page = section(&Ok(rows.collect())).into_string();
            assert!(page.contains(expected), "{labels}: {page}");
        }
        assert!(section(&Ok(vec![])).into_string().contains("<table"));
    }
}
