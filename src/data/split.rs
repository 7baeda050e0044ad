//! Finds exact duplicates and cuts the parts, from the rows' contents alone: neither threads nor
//! hash maps have a say.
//!
//! Two rows are duplicates when text and pair are equal to the byte. A text never stands on both
//! sides of a split:
//! - A given test part stays as it is, and a given validation part but for texts of the test part.
//!   Training rows with a text of either are dropped.
//! - Of training rows with equal text and label the first stays.
//! - Training rows with equal text and different labels are all dropped: which label is right is not
//!   kiln's to guess, and each of them would teach against another. All conflicts are reported.
//!
//! What the source does not give is cut from the training rows label by label: test gets
//! `round(test * rows)` of a label's rows but at least one, and must leave two; validation gets
//! `round(validation * rows)` of what it finds, possibly none, and leaves at least one. A row's place
//! in the draw is a hash of seed and text, so that a row added or moved changes little elsewhere.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::rows::Row;
use super::source::Table;
use super::{Part, count};
use crate::user_error;

/// The parts, as rows of the tables.
pub struct Outcome {
    /// Labels in the order of their ids: numbers by value where all are integers, else by name.
    pub labels: Vec<String>,
    /// By part: (table, row), in the source's order. A part that nothing gives is empty.
    pub parts: [Vec<(usize, usize)>; 3],
    /// What was dropped.
    pub duplicates: Duplicates,
}

/// Rows whose text stands elsewhere too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Duplicates {
    /// Training rows dropped because an earlier one has the same text and label.
    pub repeated: usize,
    /// Training and validation rows dropped because a given part that is held out has their text.
    pub held_out: usize,
    /// Training rows dropped because others have the same text and another label.
    pub conflicting: usize,
    /// Rows of given validation and test parts that repeat a text there; they stay.
    pub kept: usize,
    /// Texts with more than one label, wherever they stand.
    pub conflicts: Vec<Conflict>,
}

/// One text with more than one label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// The rows that have it.
    pub rows: Vec<ConflictingRow>,
}

/// A row of a [`Conflict`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictingRow {
    /// File and row.
    pub place: String,
    /// Its label.
    pub label: String,
}

/// Cuts the parts out of labelled tables, of which the first is to train on.
///
/// # Errors
/// The user's: a label with too few rows, a label that no training row has, fewer than two labels,
/// a split that leaves a part empty.
pub fn split(tables: &[(Part, Table)], config: &crate::config::Split) -> Result<Outcome> {
    let row = |at: (usize, usize)| -> &Row { &tables[at.0].1.rows[at.1] };
    let label = |at: (usize, usize)| row(at).label.as_deref().unwrap_or_default();
    let (mut kept, duplicates) = deduplicate(tables);
    let [train, validation, test] = &mut kept;
    let given = |part| tables.iter().any(|(of, _)| *of == part);

    let mut by_label = BTreeMap::<&str, Vec<(usize, usize)>>::new();
    for &at in train.iter() {
        by_label.entry(label(at)).or_default().push(at);
    }
    let mut labels: Vec<String> = by_label.keys().map(|label| (*label).to_owned()).collect();
    sort_labels(&mut labels);
    if labels.len() < 2 {
        return Err(user_error!(
            "{}: needs at least two labels to train on, got {}",
            tables[0].1.path.display(),
            labels.first().map_or("none".to_owned(), |label| format!("only {label:?}"))
        ));
    }
    for &at in validation.iter().chain(test.iter()) {
        if !by_label.contains_key(label(at)) {
            let dropped = tables[0].1.rows.iter().filter(|row| row.label.as_deref() == Some(label(at))).count();
            let dropped = match dropped {
                0 => String::new(),
                n => format!(" ({} of it dropped out as duplicates)", count(n, "row")),
            };
            return Err(user_error!(
                "{}: label {:?} is unseen in training: no row of {} has it{dropped}; drop the row or give training rows",
                tables[at.0].1.place(at.1),
                label(at),
                tables[0].1.path.display()
            ));
        }
    }

    let test_share = if given(Part::Test) { 0.0 } else { config.test };
    let validation_share = if given(Part::Validation) { 0.0 } else { config.validation };
    train.clear();
    for label in &labels {
        let rows = by_label.get_mut(label.as_str()).expect("labels are its keys");
        rows.sort_by_cached_key(|&at| (draw(config.seed, row(at)), at));
        let share = |share: f64| (share * rows.len() as f64).round() as usize;
        let tested = if test_share > 0.0 { share(test_share).max(1) } else { 0 };
        let left = rows.len().saturating_sub(tested);
        if test_share > 0.0 && left < 2 {
            return Err(user_error!(
                "split.test = {test_share} leaves {} of label {label:?} to train on: needs 2; drop the label or give more rows",
                count(left, "row")
            ));
        }
        let validated = share(validation_share).min(left - 1);
        test.extend(&rows[..tested]);
        validation.extend(&rows[tested..tested + validated]);
        train.extend(&rows[tested + validated..]);
    }
    if validation_share > 0.0 && validation.is_empty() {
        return Err(user_error!(
            "split.validation = {validation_share} leaves no row to validate on: no label has {} rows; raise it or give more rows",
            (0.5 / validation_share).ceil().max(2.0)
        ));
    }
    for part in &mut kept {
        part.sort_unstable();
    }
    Ok(Outcome { labels, parts: kept, duplicates })
}

/// Applies the module's rules. Returns the rows that stay, by part.
fn deduplicate(tables: &[(Part, Table)]) -> ([Vec<(usize, usize)>; 3], Duplicates) {
    let text = |&(table, row): &(usize, usize)| {
        let row = &tables[table].1.rows[row];
        (&row.text, &row.text_pair)
    };
    let label = |&(table, row): &(usize, usize)| tables[table].1.rows[row].label.as_deref();
    let part = |&(table, _): &(usize, usize)| tables[table].0;
    let mut all: Vec<(usize, usize)> =
        tables.iter().enumerate().flat_map(|(t, (_, table))| (0..table.rows.len()).map(move |r| (t, r))).collect();
    // Equal texts come to stand together, in the source's order.
    all.sort_by(|a, b| text(a).cmp(&text(b)).then(a.cmp(b)));

    let mut kept = [const { Vec::new() }; 3];
    let mut duplicates = Duplicates::default();
    let mut conflicts = Vec::new();
    for same in all.chunk_by(|a, b| text(a) == text(b)) {
        let of = |wanted: Part| same.iter().filter(move |at| part(at) == wanted).copied();
        let conflicting = same.iter().any(|at| label(at) != label(&same[0]));
        if conflicting {
            conflicts.push(same);
        }
        kept[Part::Test as usize].extend(of(Part::Test));
        duplicates.kept += of(Part::Test).count().saturating_sub(1);
        if of(Part::Test).next().is_some() {
            duplicates.held_out += of(Part::Validation).count() + of(Part::Train).count();
            continue;
        }
        kept[Part::Validation as usize].extend(of(Part::Validation));
        duplicates.kept += of(Part::Validation).count().saturating_sub(1);
        if of(Part::Validation).next().is_some() {
            duplicates.held_out += of(Part::Train).count();
        } else if conflicting {
            duplicates.conflicting += same.len();
        } else {
            kept[Part::Train as usize].push(same[0]);
            duplicates.repeated += same.len() - 1;
        }
    }
    conflicts.sort_unstable();
    duplicates.conflicts = conflicts
        .into_iter()
        .map(|same| Conflict {
            rows: same
                .iter()
                .map(|at| ConflictingRow {
                    place: tables[at.0].1.place(at.1),
                    label: label(at).unwrap_or_default().to_owned(),
                })
                .collect(),
        })
        .collect();
    for part in &mut kept {
        part.sort_unstable();
    }
    (kept, duplicates)
}

/// A row's place in the draw.
fn draw(seed: u64, row: &Row) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(seed.to_le_bytes());
    digest.update((row.text.len() as u64).to_le_bytes());
    digest.update(&row.text);
    digest.update(row.text_pair.as_deref().unwrap_or_default());
    digest.finalize().into()
}

/// By value where all are integers as one writes them, else by name.
fn sort_labels(labels: &mut [String]) {
    let value = |label: &String| label.parse::<i64>().ok().filter(|value| value.to_string() == *label);
    if labels.iter().all(|label| value(label).is_some()) {
        labels.sort_by_key(value);
    } else {
        labels.sort();
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn table(part: Part, rows: &[(&str, &str)]) -> (Part, Table) {
        let rows = rows.iter().enumerate().map(|(i, (text, label))| Row {
            id: i.to_string(),
            text: (*text).into(),
            label: Some((*label).into()),
            ..Row::default()
        });
        (part, Table::numbered(PathBuf::from(format!("{part}.csv")), rows.collect()))
    }

    fn shares(validation: f64, test: f64) -> crate::config::Split {
        crate::config::Split { validation, test, seed: 42 }
    }

    fn texts<'a>(tables: &'a [(Part, Table)], outcome: &Outcome, part: Part) -> Vec<&'a str> {
        outcome.parts[part as usize].iter().map(|&(table, row)| tables[table].1.rows[row].text.as_str()).collect()
    }

    fn error(tables: &[(Part, Table)], split: crate::config::Split) -> String {
        super::split(tables, &split).err().map_or("no error".into(), |e| e.to_string())
    }

    /// `n` rows of a label.
    fn many(label: &'static str, n: usize) -> Vec<(String, &'static str)> {
        (0..n).map(|i| (format!("{label} {i}"), label)).collect()
    }

    fn of(rows: &[(String, &'static str)]) -> (Part, Table) {
        table(Part::Train, &rows.iter().map(|(text, label)| (text.as_str(), *label)).collect::<Vec<_>>())
    }

    #[test]
    fn every_label_is_cut_by_its_share() {
        let tables = [of(&[many("a", 100), many("b", 10), many("c", 3)].concat())];
        let outcome = split(&tables, &shares(0.1, 0.2)).unwrap();
        let counts = |part| {
            let texts = texts(&tables, &outcome, part);
            ["a", "b", "c"].map(|label| texts.iter().filter(|text| text.starts_with(label)).count())
        };
        assert_eq!(counts(Part::Test), [20, 2, 1]);
        assert_eq!(counts(Part::Validation), [10, 1, 0]);
        assert_eq!(counts(Part::Train), [70, 7, 2]);
    }

    #[test]
    fn the_draw_knows_texts_not_places() {
        let rows = [many("a", 40), many("b", 40)].concat();
        let mut turned = rows.clone();
        turned.reverse();
        let draw = |rows: &[(String, &'static str)], seed| {
            let tables = [of(rows)];
            let split = crate::config::Split { seed, ..shares(0.1, 0.2) };
            let outcome = super::split(&tables, &split).unwrap();
            Part::ALL.map(|part| {
                let mut texts: Vec<String> = texts(&tables, &outcome, part).into_iter().map(str::to_owned).collect();
                texts.sort();
                texts
            })
        };
        assert_eq!(draw(&rows, 42), draw(&turned, 42));
        assert_ne!(draw(&rows, 42), draw(&rows, 43));
    }

    #[test]
    fn no_text_is_on_both_sides() {
        let tables = [
            table(
                Part::Train,
                &[
                    ("in test", "a"),
                    ("twice", "a"),
                    ("twice", "a"),
                    ("both", "a"),
                    ("both", "b"),
                    ("in validation", "b"),
                    ("b", "b"),
                ],
            ),
            table(Part::Validation, &[("in validation", "b"), ("in test", "a")]),
            table(Part::Test, &[("in test", "a"), ("in test", "a"), ("other", "b")]),
        ];
        let outcome = split(&tables, &shares(0.1, 0.2)).unwrap();
        assert_eq!(texts(&tables, &outcome, Part::Train), ["twice", "b"]);
        assert_eq!(texts(&tables, &outcome, Part::Validation), ["in validation"]);
        assert_eq!(texts(&tables, &outcome, Part::Test), ["in test", "in test", "other"]);
        let row = |place: &str, label: &str| ConflictingRow { place: place.into(), label: label.into() };
        let conflicts = vec![Conflict { rows: vec![row("train.csv: row 3", "a"), row("train.csv: row 4", "b")] }];
        assert_eq!(outcome.duplicates, Duplicates { repeated: 1, held_out: 3, conflicting: 2, kept: 1, conflicts });
    }

    #[test]
    fn pairs_are_duplicates_only_as_pairs() {
        let mut tables = [table(Part::Train, &[("x", "a"), ("x", "b"), ("x", "b")])];
        for (row, pair) in tables[0].1.rows.iter_mut().zip(["1", "2", "2"]) {
            row.text_pair = Some(pair.into());
        }
        let outcome = split(&tables, &shares(0.0, 0.0)).unwrap();
        assert_eq!(outcome.parts[Part::Train as usize], [(0, 0), (0, 1)]);
    }

    #[test]
    fn too_few_rows_are_an_error_where_test_is_cut() {
        let tables = [of(&[many("a", 10), many("tender", 2)].concat())];
        assert_eq!(
            error(&tables, shares(0.1, 0.2)),
            "split.test = 0.2 leaves 1 row of label \"tender\" to train on: needs 2; drop the label or give more rows"
        );
        assert_eq!(
            error(&[of(&[many("a", 3), many("b", 3)].concat())], shares(0.1, 0.2)),
            "split.validation = 0.1 leaves no row to validate on: no label has 5 rows; raise it or give more rows"
        );
        assert_eq!(
            error(&[of(&many("a", 9))], shares(0.1, 0.2)),
            "train.csv: needs at least two labels to train on, got only \"a\""
        );
    }

    #[test]
    fn rare_labels_stay_in_training_where_test_is_given() {
        let tables = [of(&[many("a", 20), many("b", 1), many("c", 2)].concat()), table(Part::Test, &[("x", "b")])];
        let outcome = split(&tables, &shares(0.5, 0.2)).unwrap();
        let train = texts(&tables, &outcome, Part::Train);
        assert!(train.contains(&"b 0") && train.iter().any(|text| text.starts_with('c')));
        assert_eq!(outcome.parts[Part::Validation as usize].len(), 11);
    }

    #[test]
    fn a_label_unseen_in_training_names_its_row() {
        let tables = [of(&[many("a", 3), many("b", 3)].concat()), table(Part::Test, &[("x", "a"), ("y", "c")])];
        assert_eq!(
            error(&tables, shares(0.4, 0.2)),
            "test.csv: row 1: label \"c\" is unseen in training: no row of train.csv has it; drop the row or give training rows"
        );
        let tables = [of(&[many("a", 3), many("b", 3), many("c", 1)].concat()), table(Part::Test, &[("c 0", "c")])];
        assert!(error(&tables, shares(0.4, 0.2)).contains("has it (1 row of it dropped out as duplicates)"));
    }

    #[test]
    fn integer_labels_go_by_value() {
        let labels = |labels: &[&str]| {
            let mut labels: Vec<String> = labels.iter().map(|label| (*label).to_owned()).collect();
            sort_labels(&mut labels);
            labels
        };
        assert_eq!(labels(&["10", "9", "-1"]), ["-1", "9", "10"]);
        assert_eq!(labels(&["10", "9", "09"]), ["09", "10", "9"]);
        assert_eq!(labels(&["b", "a", "1"]), ["1", "a", "b"]);
    }
}
