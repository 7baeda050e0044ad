//! report.html: a run to look at, in one file that loads nothing.
//!
//! It is made from the run's files alone, and the same files make the same bytes. What is missing, as in a
//! run that was stopped or has no test part, leaves its section out and says so in a line. All markup is
//! maud's, which escapes what is put into it; its Content-Security-Policy forbids what might get past that
//! to load anything.

mod calibration;
mod certificate;
mod chart;
mod comparison;
mod confusion;
mod curves;
mod data;
mod labels;
mod texts;

use std::fs;
use std::path::Path;

use anyhow::Result;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::comparison_table::{duration, name, short};
use super::{Compared, Comparison, Summary, date, read_predictions, shorten};
use crate::data::{Part, Row, Snapshot};
use crate::metrics::Statistics;
use crate::store::{self, JobType, ModelDir, RunDir, RunRecord, Status};
use crate::track;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");
/// Nothing is fetched, and nothing is run or shown but what stands in the page.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; \
                      base-uri 'none'; form-action 'none'";
/// Columns of a label, a name or an id.
const LABEL_COLUMNS: usize = 60;

/// What a file says, or the sentence why it says nothing.
type Found<T> = Result<T, String>;

/// A model of the run.
struct Model {
    name: String,
    files: ModelDir,
    max_length: Option<usize>,
}

/// What more than one section reads.
struct Page<'a> {
    run: &'a RunDir,
    record: RunRecord,
    summary: Summary,
    models: Vec<Model>,
    comparison: Found<Comparison>,
    snapshot: Found<Snapshot>,
    test_rows: Found<Vec<Row>>,
    /// Whether the page stands in the run's folder, from where others are reached.
    at_home: bool,
}

/// Makes a run's page from its files, and writes it to `output`.
///
/// # Errors
/// run.json cannot be read; the page cannot be written.
pub fn write_report(run: &RunDir, output: &Path) -> Result<()> {
    let page = Page::read(run, output == run.report_html())?.render().into_string();
    store::write_bytes(output, visible(&page).as_bytes())
}

impl<'a> Page<'a> {
    fn read(run: &'a RunDir, at_home: bool) -> Result<Self> {
        let record = run.record()?;
        let trained = if record.job_type == JobType::Comparison { Vec::new() } else { record.models.clone() };
        let config = run.pins().ok().map(|pins| pins.config);
        let max_length = |name: &str| Some(config.as_ref()?.models.iter().find(|model| model.name == name)?.max_length);
        let model = |name: String| Model { files: run.model(&name), max_length: max_length(&name), name };
        let snapshot = Snapshot::open(&run.snapshot_dir()?).map_err(|error| format!("{error:#}."));
        let test_rows = match &snapshot {
            Ok(snapshot) => snapshot.rows(Part::Test).map_err(|error| format!("{error:#}.")),
            Err(why) => Err(why.clone()),
        };
        Ok(Self {
            run,
            summary: Summary::of(run),
            models: trained.into_iter().map(model).collect(),
            comparison: found(
                &run.comparison_json(),
                ("comparison.json", "the models are not compared"),
                store::read_json,
            ),
            snapshot,
            test_rows,
            record,
            at_home,
        })
    }

    fn render(&self) -> Markup {
        let reference = self.run.reference();
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta http-equiv="Content-Security-Policy" content=(POLICY);
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    meta name="generator" content={ "kiln " (env!("CARGO_PKG_VERSION")) };
                    title { (reference) " · kiln" }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    (self.header(&reference))
                    main {
                        (self.compared())
                        @for (index, model) in self.models.iter().enumerate() { (self.model(index, model)) }
                        (data::section(&self.snapshot, &self.models))
                        @if self.record.job_type != JobType::Comparison { (self.configuration()) }
                    }
                    script { (PreEscaped(SCRIPT)) }
                }
            }
        }
    }

    fn header(&self, reference: &str) -> Markup {
        let RunRecord { job_type, status, start, .. } = &self.record;
        html! {
            header {
                h1 { (reference) }
                p.meta {
                    span class={ "badge " (tone(*status)) } { (status.name()) }
                    " " (job_type.name()) ", started "
                    time datetime=(date(*start, "%Y-%m-%dT%H:%M:%SZ")) { (date(*start, "%Y-%m-%d %H:%M UTC")) }
                    @if let Some(seconds) = self.summary.training_seconds { ", trained for " (duration(seconds)) }
                }
                @if let Some(problem) = &self.summary.problem {
                    p.absent { "Something is wrong with the run’s files: " (problem) }
                }
                @if let Some(best) = &self.summary.best {
                    dl.figures.headline {
                        div { dt { "best model" } dd { (label(&best.model)) } }
                        div { dt { (name(best.metric)) " on validation" } dd { (figure(best.validation)) } }
                        @if let Some(test) = best.test {
                            div { dt { "macro F1 on test" } dd { (figure(test.macro_f1)) } }
                            div { dt { "accuracy on test" } dd { (figure(test.accuracy)) } }
                        }
                    }
                }
                nav aria-label="Sections" {
                    ul {
                        @if self.comparison.is_ok() { li { a href="#comparison" { "Comparison" } } }
                        @for (index, model) in self.models.iter().enumerate() {
                            li { a href={ "#model-" (index) } { (label(&model.name)) } }
                        }
                        li { a href="#data" { "Data" } }
                        @if self.record.job_type != JobType::Comparison {
                            li { a href="#configuration" { "Configuration" } }
                        }
                    }
                }
            }
        }
    }

    fn compared(&self) -> Markup {
        match &self.comparison {
            Ok(comparison) => comparison::section(comparison, |model| self.link(model)),
            Err(why) if self.models.len() != 1 => {
                html! { section id="comparison" { h2 { "Comparison" } p.absent { (why) } } }
            }
            Err(_) => html! {},
        }
    }

    /// Where a compared model's own sections are: in this page, or in its run's, where that lies beside.
    fn link(&self, compared: &Compared) -> Option<String> {
        if compared.run == self.run.reference() {
            let index = self.models.iter().position(|model| model.name == compared.model)?;
            return Some(format!("#model-{index}"));
        }
        let (experiment, run_num) = compared.run.split_once('/')?;
        let page = format!("../../../{experiment}/runs/{run_num}/report.html");
        (self.at_home && self.run.dir().join(&page).is_file()).then_some(page)
    }

    fn model(&self, index: usize, model: &Model) -> Markup {
        let files = &model.files;
        let validation: Found<Statistics> = found(
            &files.statistics_json(),
            ("statistics.json", "the model is not trained to its end"),
            store::read_json,
        );
        let test: Found<Statistics> = found(
            &files.test().join("statistics.json"),
            ("test/statistics.json", "the model is not tested"),
            store::read_json,
        );
        let predictions = found(
            &files.test().join("predictions.parquet"),
            ("test/predictions.parquet", "the model is not tested"),
            read_predictions,
        );
        let events = found(&files.metrics_jsonl(), ("metrics.jsonl", "no step is made yet"), track::read);
        let labels = self.snapshot.as_ref().ok().map(Snapshot::labels);
        html! {
            section id={ "model-" (index) } {
                h2 { (label(&model.name)) }
                (figures(test.as_ref().ok(), validation.as_ref().ok()))
                (curves::section(&events))
                @if let Err(why) = &test { (absent("Test", why)) }
                @match (&test, &validation) {
                    (Ok(test), validation) => {
                        (confusion::section(&predictions))
                        (labels::section(test, "test", validation.as_ref().ok()))
                        (calibration::section(test, "test"))
                        (texts::mistakes(&predictions, &self.test_rows, labels))
                    }
                    (Err(_), Ok(validation)) => {
                        (labels::section(validation, "validation", None))
                        (calibration::section(validation, "validation"))
                    }
                    (Err(_), Err(why)) => { (absent("Validation", why)) }
                }
                (certificate::section(files))
            }
        }
    }

    fn configuration(&self) -> Markup {
        let read = |path: &Path| Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned());
        let files = [
            ("experiment.toml", found(&self.run.experiment_toml(), ("experiment.toml", "it was taken away"), read)),
            ("lock.json", found(&self.run.lock_json(), ("lock.json", "it was taken away"), read)),
        ];
        html! {
            section id="configuration" {
                h2 { "Configuration" }
                @for (name, content) in &files {
                    @match content {
                        Ok(content) => { details { summary { (name) } pre tabindex="0" { code { (content) } } } }
                        Err(why) => { p.absent { (why) } }
                    }
                }
            }
        }
    }
}

/// A model in a few figures.
fn figures(test: Option<&Statistics>, validation: Option<&Statistics>) -> Markup {
    let mut figures: Vec<(&str, String)> = Vec::new();
    let mut add = |what, value: Option<String>| figures.extend(value.map(|value| (what, value)));
    add("macro F1 on test", test.map(|s| figure(s.macro_f1)));
    add("accuracy on test", test.map(|s| figure(s.accuracy)));
    add("loss on test", test.and_then(|s| s.loss).map(figure));
    add("test rows", test.map(|s| s.examples.to_string()));
    add("test rows/s", test.and_then(|s| s.throughput).map(|throughput| short(throughput.examples_per_second)));
    add("macro F1 on validation", validation.map(|s| figure(s.macro_f1)));
    add("accuracy on validation", validation.map(|s| figure(s.accuracy)));
    add("trained for", validation.and_then(|s| s.training_seconds).map(duration));
    html! {
        @if !figures.is_empty() {
            dl.figures { @for (what, value) in figures { div { dt { (what) } dd { (value) } } } }
        }
    }
}

/// What a status is worth to the eye.
fn tone(status: Status) -> &'static str {
    match status {
        Status::Finished => "good",
        Status::Failed => "bad",
        Status::Training | Status::Stopped | Status::Interrupted => "plain",
    }
}

/// What `read` makes of a file, or why there is nothing: under the `name` that people know the file by, what
/// it `means` that it is not there.
fn found<T>(path: &Path, (name, means): (&str, &str), read: impl FnOnce(&Path) -> Result<T>) -> Found<T> {
    if !path.exists() {
        return Err(format!("{name} is not there: {means}."));
    }
    read(path).map_err(|error| format!("{name} is broken: {error:#}."))
}

/// A section that is left out, and why.
fn absent(title: &str, why: &str) -> Markup {
    html! { h3 { (title) } p.absent { (why) } }
}

/// A score or a loss.
fn figure(value: f64) -> String {
    if value.is_finite() { format!("{value:.4}") } else { "–".into() }
}

/// A label, a name or an id on one line, for an attribute.
fn plain(name: &str) -> String {
    shorten(name, LABEL_COLUMNS)
}

/// The same in the text. Whichever way it is written, it does not turn around what stands beside it.
fn label(name: &str) -> Markup {
    html! { bdi { (plain(name)) } }
}

/// HTML holds no control characters: they become their pictures.
fn visible(page: &str) -> String {
    let see = |c: char| match c {
        '\n' | '\t' => c,
        '\0'..='\x1f' => char::from_u32(0x2400 + u32::from(c)).unwrap_or(char::REPLACEMENT_CHARACTER),
        '\x7f' => '\u{2421}',
        '\u{80}'..='\u{9f}' | '\u{fdd0}'..='\u{fdef}' => char::REPLACEMENT_CHARACTER,
        c if u32::from(c) & 0xfffe == 0xfffe => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    page.replace("\r\n", "\n").chars().map(see).collect()
}

#[cfg(test)]
mod tests;
