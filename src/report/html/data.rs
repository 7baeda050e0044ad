use maud::{Markup, html};

use super::{Found, Model, absent, label};
use crate::data::card::EncodingCard;
use crate::data::split::Duplicates;
use crate::data::{Part, Snapshot};
use crate::store;

const PART_COLUMNS: [&str; 7] = ["rows", "p5", "p50", "p95", "p99", "max", "mean"];
const TOKEN_COLUMNS: [&str; 5] = ["p50", "p95", "max", "max_length", "truncated"];

/// What the data is: rows, labels and lengths of each part, and what was dropped or cut.
pub fn section(snapshot: &Found<Snapshot>, models: &[Model]) -> Markup {
    let snapshot = match snapshot {
        Ok(snapshot) => snapshot,
        Err(why) => return html! { section id="data" { h2 { "Data" } p.absent { (why) } } },
    };
    let card = snapshot.card();
    let parts: Vec<_> = Part::ALL.iter().filter_map(|p| Some((p.name(), card.parts.get(p.name())?))).collect();
    let rows = |name: &str| {
        parts.iter().map(|(_, part)| part.labels.get(name).and_then(|n| n.as_u64()).unwrap_or(0)).collect()
    };
    let labels: Vec<(&str, Vec<u64>)> = snapshot.labels().iter().map(|name| (name.as_str(), rows(name))).collect();
    let Duplicates { repeated, held_out, conflicting, kept, ref conflicts } = card.duplicates;
    let (doubled, warnings) = (repeated + held_out + conflicting + kept + conflicts.len(), card.warnings());
    html! {
        section id="data" {
            h2 { "Data" }
            p.quiet { "Snapshot " code { (snapshot.hash()) } ", " (labels.len()) " labels." }
            div.beside {
                div {
                    h3 { "Parts" }
                    div.scroll tabindex="0" role="region" aria-label="Parts" {
                        table {
                            caption { "Words of a row, between white space: percentiles, the longest, the mean." }
                            thead { tr {
                                th scope="col" { "part" }
                                @for name in PART_COLUMNS { th.number scope="col" { (name) } }
                            } }
                            tbody {
                                @for (name, part) in &parts {
                                    @let w = &part.words;
                                    tr {
                                        th scope="row" { (name) }
                                        td.number { (part.rows) }
                                        @for length in [w.p5, w.p50, w.p95, w.p99, w.max] { td.number { (length) } }
                                        td.number { (format!("{:.1}", w.mean)) }
                                    }
                                }
                            }
                        }
                    }
                    (truncation(snapshot, models))
                    h3 { "Duplicates and conflicts" }
                    @if doubled == 0 { p { "No text stands twice." } }
                    @if !warnings.is_empty() { ul { @for warning in &warnings { li { (warning) } } } }
                    @if kept > 0 { p { (kept) " rows of given parts repeat a text there; they stay." } }
                }
                div {
                    h3 { "Rows of each label" }
                    div.scroll.tall tabindex="0" role="region" aria-label="Rows of each label" {
                        table.sortable {
                            thead { tr {
                                th scope="col" aria-sort="ascending" { "label" }
                                @for (name, _) in &parts { th.number scope="col" { (name) } }
                            } }
                            tbody {
                                @for (name, rows) in &labels {
                                    tr {
                                        th scope="row" { (label(name)) }
                                        @for n in rows { td.number data-value=(n) { (n) } }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What each model's tokenizer and `max_length` make of the rows.
fn truncation(snapshot: &Snapshot, models: &[Model]) -> Markup {
    let encodings: Vec<(&str, Part, EncodingCard)> = models
        .iter()
        .flat_map(|model| encodings(snapshot, model).into_iter().map(|(part, card)| (model.name.as_str(), part, card)))
        .collect();
    if models.is_empty() {
        return html! {};
    }
    if encodings.is_empty() {
        return absent(
            "Tokens",
            "The encodings are not beside the snapshot: how many rows were truncated is not known.",
        );
    }
    html! {
        h3 { "Tokens" }
        div.scroll tabindex="0" role="region" aria-label="Tokens" {
            table {
                caption { "Tokens of a row before truncation, special tokens included." }
                thead { tr {
                    th scope="col" { "model" } th scope="col" { "part" }
                    @for name in TOKEN_COLUMNS { th.number scope="col" { (name) } }
                } }
                tbody {
                    @for (name, part, card) in &encodings {
                        tr {
                            th scope="row" { (label(name)) }
                            td { (part.name()) }
                            @let share = 100.0 * card.truncated as f64 / card.rows.max(1) as f64;
                            @let lengths = [card.tokens.p50, card.tokens.p95, card.tokens.max, card.max_length];
                            @for length in lengths { td.number { (length) } }
                            td.number { (card.truncated) " (" (format!("{share:.1}")) " %)" }
                        }
                    }
                }
            }
        }
    }
}

/// The cards of a model's encodings: those of its tokenizer.json and `max_length`.
fn encodings(snapshot: &Snapshot, model: &Model) -> Vec<(Part, EncodingCard)> {
    let Ok(tokenizer) = store::sha256_file(&model.files.model().join("tokenizer.json")) else { return Vec::new() };
    let its_own = |card: &EncodingCard| {
        tokenizer.starts_with(&card.tokenizer) && model.max_length.is_none_or(|length| length == card.max_length)
    };
    let card = |part| snapshot.encoding_cards(part).into_iter().find(its_own).map(|card| (part, card));
    Part::ALL.into_iter().filter_map(card).collect()
}
