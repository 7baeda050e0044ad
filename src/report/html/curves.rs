use maud::{Markup, html};

use super::chart::{Chart, Line};
use super::{Found, absent, figure};
use crate::report::axis::{SMOOTH_FROM, counted, decimal, loss_axis, rate_axis, scientific, score_axis, smoothed};
use crate::track::{Evaluation, Event, Step};

/// More evaluations than this are not told one by one.
const MOST_EVALUATIONS: usize = 200;
const COLUMNS: [&str; 7] = ["step", "epoch", "training loss", "validation loss", "macro F1", "accuracy", "weighted F1"];

/// A training's losses, scores and learning rate over its steps.
pub fn section(events: &Found<Vec<Event>>) -> Markup {
    let events = match events {
        Ok(events) if events.is_empty() => return absent("Curves", "metrics.jsonl holds no event yet."),
        Ok(events) => events,
        Err(why) => return absent("Curves", why),
    };
    let (mut steps, mut evaluations): (Vec<&Step>, Vec<&Evaluation>) = (Vec::new(), Vec::new());
    for event in events {
        match event {
            Event::Step(step) => steps.push(step),
            Event::Evaluation(evaluation) => evaluations.push(evaluation),
            Event::Start(_) | Event::Test(_) | Event::End(_) => {}
        }
    }
    let best = evaluations.iter().rfind(|e| e.best);
    let last_step = steps.last().map(|s| s.step).max(evaluations.last().map(|e| e.step)).unwrap_or(0);
    let chart = |title, lines, axis, label| Chart { title, lines, axis, label, last_step, best: best.map(|e| e.step) };
    let epochs = steps.last().map(|s| s.epoch).into_iter().chain(evaluations.last().map(|e| e.epoch));
    let epochs = epochs.fold(0.0, f64::max);
    html! {
        h3 { "Curves" }
        p.quiet {
            (counted(last_step as f64, "step")) ", " (counted(epochs, "epoch"))
            @match best {
                Some(best) => { "; the best evaluation, at step " (best.step) ", is marked." }
                None => { "; not evaluated yet." }
            }
        }
        div.charts {
            (chart("Loss", losses(&steps, &evaluations), loss_axis, decimal).render())
            (chart("F1 on validation", scores(&evaluations), score_axis, decimal).render())
            (chart("Learning rate", rates(&steps), rate_axis, scientific).render())
        }
        @if !evaluations.is_empty() && evaluations.len() <= MOST_EVALUATIONS { (table(&evaluations)) }
    }
}

fn losses<'a>(steps: &[&Step], evaluations: &[&Evaluation]) -> Vec<Line<'a>> {
    let train: Vec<_> = steps.iter().map(|s| (s.step, s.train_loss)).collect();
    let validation = evaluations.iter().map(|e| (e.step, e.validation_loss)).collect();
    let validation = Line { name: "validation", class: "orange", points: validation, dots: true };
    if train.len() < SMOOTH_FROM || !train.iter().all(|(_, loss)| loss.is_finite()) {
        return vec![Line { name: "training", class: "blue", points: train, dots: false }, validation];
    }
    let smooth = Line { name: "training, smoothed", class: "blue", points: smoothed(&train), dots: false };
    vec![Line { name: "", class: "blue pale", points: train, dots: false }, smooth, validation]
}

fn scores<'a>(evaluations: &[&Evaluation]) -> Vec<Line<'a>> {
    let line = |name, class, value: fn(&Evaluation) -> f64| {
        let points = evaluations.iter().map(|e| (e.step, value(e))).collect();
        Line { name, class, points, dots: true }
    };
    // Where they coincide, the dashed ones show the ones below through their gaps.
    vec![
        line("weighted", "green", |e| e.validation_weighted_f1),
        line("micro = accuracy", "blue short", |e| e.validation_micro_f1),
        line("macro", "orange long", |e| e.validation_macro_f1),
    ]
}

fn rates<'a>(steps: &[&Step]) -> Vec<Line<'a>> {
    let points = steps.iter().map(|s| (s.step, s.learning_rate)).collect();
    vec![Line { name: "learning rate", class: "blue", points, dots: false }]
}

/// In the order of [`COLUMNS`], from the losses on.
fn figures(e: &Evaluation) -> [f64; 5] {
    [e.train_loss, e.validation_loss, e.validation_macro_f1, e.validation_accuracy, e.validation_weighted_f1]
}

fn table(evaluations: &[&Evaluation]) -> Markup {
    html! {
        details {
            summary { "The evaluations as a table" }
            div.scroll tabindex="0" role="region" aria-label="Evaluations" {
                table {
                    thead {
                        tr {
                            @for name in COLUMNS { th.number scope="col" { (name) } }
                            th scope="col" { "best so far" }
                        }
                    }
                    tbody {
                        @for e in evaluations {
                            tr {
                                th.number scope="row" { (e.step) }
                                td.number { (format!("{:.2}", e.epoch)) }
                                @for value in figures(e) { td.number { (figure(value)) } }
                                td { @if e.best { "yes" } }
                            }
                        }
                    }
                }
            }
        }
    }
}
