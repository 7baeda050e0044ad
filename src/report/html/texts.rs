//! Rows with their texts: what a model has most surely wrong, and what models see otherwise.

use maud::{Markup, html};

use super::{Found, absent, label};
use crate::data::Row;
use crate::report::{Comparison, Disagreement, Predicted};

/// Mistakes that are shown.
const MOST_MISTAKES: usize = 20;
/// Disagreements that are shown.
const MOST_DISAGREEMENTS: usize = 40;
/// Characters of a text that are shown.
const MOST_CHARACTERS: usize = 600;

/// The most confident wrong predictions. `rows` are the test part's, with the texts; `labels` are in id order.
pub fn mistakes(predictions: &Found<Vec<Predicted>>, rows: &Found<Vec<Row>>, labels: Option<&[String]>) -> Markup {
    let Ok(predictions) = predictions else {
        return html! {}; // the confusion matrix has said why
    };
    let confidence = |row: &Predicted| row.probabilities.iter().copied().filter(|p| p.is_finite()).fold(0.0, f32::max);
    let mut wrong: Vec<(usize, &Predicted)> =
        predictions.iter().enumerate().filter(|(_, p)| p.label.as_ref().is_some_and(|l| *l != p.prediction)).collect();
    wrong.sort_by(|(_, a), (_, b)| confidence(b).total_cmp(&confidence(a)));
    let all = wrong.len();
    if all == 0 {
        return absent("Hardest mistakes", "Every row of the test part is right.");
    }
    wrong.truncate(MOST_MISTAKES);
    let text_of = |i: usize, id: &str| rows.as_ref().ok().and_then(|rows| rows.get(i)).filter(|row| row.id == id);
    let of_truth = |p: &Predicted| {
        let id = labels?.iter().position(|name| Some(name) == p.label.as_ref())?;
        p.probabilities.get(id).copied()
    };
    html! {
        h3 { "Hardest mistakes" }
        p.quiet {
            @if all > wrong.len() { "Of " (all) " wrong predictions, the " (MOST_MISTAKES) " it is surest of." }
            @else { "All " (all) " wrong predictions, the surest first." }
            @if let Err(why) = rows { " Their texts are left out: " (why) }
        }
        ol.texts {
            @for (i, p) in wrong {
                li {
                    p.said {
                        span.id { (label(&p.id)) }
                        span.verdict {
                            span.true {
                                (label(p.label.as_deref().unwrap_or_default()))
                                @if let Some(share) = of_truth(p) { " " (percent(share)) }
                            }
                            span.arrow { " taken for " }
                            span.wrong { (label(&p.prediction)) " " (percent(confidence(p))) }
                        }
                    }
                    @if let Some(row) = text_of(i, &p.id) { (texts(&row.text, row.text_pair.as_deref())) }
                }
            }
        }
    }
}

/// The rows that not all models predict alike, those first of which two are the surest of different labels.
pub fn disagreements(comparison: &Comparison) -> Markup {
    let all = comparison.disagreements.len();
    let mut rows: Vec<&Disagreement> = comparison.disagreements.iter().collect();
    rows.sort_by(|a, b| strength(b).total_cmp(&strength(a)));
    rows.truncate(MOST_DISAGREEMENTS);
    if all == 0 {
        return absent("Disagreements", "The models predict every row alike.");
    }
    html! {
        h3 { "Disagreements" }
        p.quiet {
            @if all > rows.len() {
                "Of " (all) " rows that the models predict otherwise, the " (rows.len())
                " on which they are surest of different labels; all are in comparison.json."
            } @else { "The " (all) " rows that the models predict otherwise, first those on which they are surest." }
        }
        ol.texts {
            @for row in rows {
                li {
                    p.said {
                        span.id { (label(&row.id)) }
                        span.verdict { "is " span.true { (label(&row.label)) } }
                    }
                    ul.says {
                        @for (name, said) in &row.predictions {
                            @let right = said.prediction == row.label;
                            li {
                                (label(name)) ": "
                                span class=(if right { "true" } else { "wrong" }) {
                                    (label(&said.prediction)) " " (percent(said.probability))
                                }
                                @if right { " (right)" } @else { " (wrong)" }
                            }
                        }
                    }
                    (texts(&row.text, row.text_pair.as_deref()))
                }
            }
        }
    }
}

/// How sure two models are of different labels, at most.
fn strength(row: &Disagreement) -> f32 {
    let said = || row.predictions.iter().map(|(_, said)| said);
    let others = said().flat_map(|a| said().map(move |b| (a, b))).filter(|(a, b)| a.prediction != b.prediction);
    others.map(|(a, b)| a.probability.min(b.probability)).filter(|p| p.is_finite()).fold(0.0, f32::max)
}

fn texts(text: &str, pair: Option<&str>) -> Markup {
    html! {
        (passage(text))
        @if let Some(pair) = pair { p.with { "with" } (passage(pair)) }
    }
}

/// A text, cut where it is long. It brings its own direction and no markup.
fn passage(text: &str) -> Markup {
    let (shown, rest) = excerpt(text, MOST_CHARACTERS);
    html! {
        p.text dir="auto" { (shown) @if rest > 0 { "…" } }
        @if rest > 0 { p.cut { (rest) " more characters" } }
    }
}

/// The first characters of a text, and how many there are more.
fn excerpt(text: &str, characters: usize) -> (&str, usize) {
    let end = text.char_indices().nth(characters).map_or(text.len(), |(at, _)| at);
    let (shown, rest) = text.split_at(end);
    (shown, rest.chars().count())
}

fn percent(share: f32) -> String {
    // 100 % would say more than is known.
    if share > 0.999 && share < 1.0 { "> 99.9 %".into() } else { format!("{:.1} %", f64::from(share) * 100.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(id: &str, probability: f32) -> Predicted {
        let probabilities = vec![1.0 - probability, probability];
        Predicted { id: id.into(), label: Some("no".into()), prediction: "yes".into(), probabilities }
    }

    fn row(id: &str, text: &str, pair: Option<&str>) -> Row {
        Row { id: id.into(), text: text.into(), text_pair: pair.map(Into::into), ..Row::default() }
    }

    #[test]
    fn hostile_texts_stay_texts() {
        let hostile = "<script>alert(\"1\")</script> & 'x' ]]> <!-- שלום \u{202e}txt";
        let rows = vec![row("<b>", hostile, Some("</p><img src=x onerror=alert(1)>")), row("2", "", None)];
        let page = mistakes(&Ok(vec![wrong("<b>", 0.9), wrong("2", f32::NAN)]), &Ok(rows), None).into_string();
        for markup in ["<script", "<img", "<b>", "<!--"] {
            assert!(!page.contains(markup), "{markup} is in {page}");
        }
        assert!(page.contains("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; 'x'"), "{page}");
        assert!(page.contains(r#"<p class="with">with</p><p class="text" dir="auto">&lt;/p&gt;&lt;img"#), "{page}");
        assert_eq!(page.matches("dir=\"auto\"").count(), 3, "each text has its own direction: {page}");
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let long = "é日🙂".repeat(33_000); // 297 kB
        let (shown, rest) = excerpt(&long, MOST_CHARACTERS);
        assert_eq!((shown.chars().count(), shown.chars().count() + rest), (600, 99_000));
        assert_eq!(excerpt("日本", 2), ("日本", 0));
        let page = mistakes(&Ok(vec![wrong("1", 0.9)]), &Ok(vec![row("1", &long, None)]), None).into_string();
        assert!(page.len() < 5_000 && page.contains("…</p><p class=\"cut\">98400 more characters"), "{}", page.len());
    }

    #[test]
    fn the_surest_come_first_and_texts_may_be_missing() {
        let predictions = (0..50).map(|i| wrong(&i.to_string(), 0.5 + i as f32 / 100.0)).collect();
        let labels = ["no", "yes"].map(String::from);
        let page = mistakes(&Ok(predictions), &Err("it is elsewhere".into()), Some(&labels)).into_string();
        assert!(page.contains("Of 50 wrong predictions, the 20") && page.contains("left out: it is elsewhere"));
        let first = page.find("<li>").unwrap();
        assert!(page[first..].starts_with(r#"<li><p class="said"><span class="id"><bdi>49</bdi></span>"#), "{page}");
        assert!(page.contains("<bdi>no</bdi> 1.0 %") && page.contains("<bdi>yes</bdi> 99.0 %"), "{page}");
        assert_eq!(percent(0.99951), "> 99.9 %");
    }
}
