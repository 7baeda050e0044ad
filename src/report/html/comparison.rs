use maud::{Markup, html};

use super::chart::{place, ticks};
use super::{figure, label, texts};
use crate::report::comparison_table::{duration, name, p_value, short, signed};
use crate::report::{Compared, Comparison, Pair, Verdict};

/// The picture of the intervals, in SVG units.
const WIDTH: f64 = 400.0;
const LEFT: f64 = 14.0;
const RIGHT: f64 = 386.0;
const ROW: f64 = 44.0;

/// Models side by side. `link` says where a model's own sections are, if they are anywhere.
pub fn section(comparison: &Comparison, link: impl Fn(&Compared) -> Option<String>) -> Markup {
    html! {
        section id="comparison" {
            h2 { "Comparison" }
            p.quiet {
                "Figures are of the test part of snapshot " code { (comparison.snapshot) } "; the best is chosen by "
                (name(comparison.objective.metric)) " on validation, and had no part in the test."
            }
            (side_by_side(comparison, link))
            h3 { "Pairs" }
            p.quiet {
                "The difference of macro F1 with its " (format!("{:.0}", comparison.confidence * 100.0)) " % interval ("
                (comparison.resamples) " paired bootstrap resamples). Where the interval holds 0, it is a tie. "
                "McNemar’s exact test is of accuracy."
            }
            (intervals(&comparison.pairs))
            (texts::disagreements(comparison))
        }
    }
}

fn side_by_side(comparison: &Comparison, link: impl Fn(&Compared) -> Option<String>) -> Markup {
    let columns = ["accuracy", "macro F1", "weighted F1", "loss", "ECE", "rows/s", "MB", "trained"];
    html! {
        div.scroll tabindex="0" role="region" aria-label="Models side by side" {
            table.sortable {
                caption { "The best model on validation is marked." }
                thead { tr {
                    th scope="col" { "model" }
                    th.number scope="col" { (name(comparison.objective.metric)) " on validation" }
                    @for column in columns { th.number scope="col" { (column) } }
                } }
                tbody {
                    @for (model, compared) in &comparison.models {
                        @let best = *model == comparison.best;
                        tr class=[best.then_some("best")] {
                            th scope="row" {
                                @match link(compared) {
                                    Some(href) => { a href=(href) { (label(model)) } }
                                    None => { (label(model)) }
                                }
                                @if best { " " span.badge { "best" } }
                            }
                            (cell(Some(compared.validation), figure(compared.validation)))
                            (figures(compared))
                        }
                    }
                }
            }
        }
    }
}

fn figures(model: &Compared) -> Markup {
    let s = &model.statistics;
    let ece = s.calibration.as_ref().map(|calibration| calibration.ece);
    let rate = s.throughput.map(|throughput| throughput.examples_per_second);
    let megabytes = model.bytes as f64 / 1e6;
    html! {
        (cell(Some(s.accuracy), figure(s.accuracy)))
        (cell(Some(s.macro_f1), figure(s.macro_f1)))
        (cell(Some(s.weighted_f1), figure(s.weighted_f1)))
        (cell(s.loss, s.loss.map_or_else(String::new, figure)))
        (cell(ece, ece.map_or_else(String::new, figure)))
        (cell(rate, rate.map_or_else(String::new, short)))
        (cell(Some(megabytes), short(megabytes)))
        (cell(s.training_seconds, s.training_seconds.map_or_else(String::new, duration)))
    }
}

fn cell(value: Option<f64>, shown: String) -> Markup {
    html! { td.number data-value=[value] { @if shown.is_empty() { "–" } @else { (shown) } } }
}

/// Each pair's interval over one axis, and what it says.
fn intervals(pairs: &[Pair]) -> Markup {
    let ends = pairs.iter().flat_map(|pair| [pair.interval[0], pair.interval[1], pair.f1_difference]);
    let reach = ends.filter(|end| end.is_finite()).fold(0.01, |reach: f64, end| reach.max(end.abs())) * 1.1;
    let x = |value: f64| place((LEFT + RIGHT) / 2.0 + value.clamp(-reach, reach) / reach * (RIGHT - LEFT) / 2.0);
    html! {
        ul.pairs {
            @for pair in pairs {
                @let [low, high] = pair.interval;
                @let class = if pair.verdict == Verdict::Tie { "tie" } else { "clear" };
                li {
                    p {
                        span.names { (label(&pair.a)) " − " (label(&pair.b)) }
                        " " b { (signed(pair.f1_difference)) } " [" (signed(low)) ", " (signed(high)) "] "
                        span class={ "badge " (class) } { (verdict(pair)) }
                    }
                    svg viewBox={ "0 0 " (WIDTH) " " (ROW) } role="img"
                        aria-label={
                            "Difference " (signed(pair.f1_difference)) ", from " (signed(low)) " to " (signed(high))
                        } {
                        @for tick in ticks(-reach, reach, 6) {
                            line.grid x1=(x(tick)) x2=(x(tick)) y1="2" y2="26" {}
                            text.tick.x x=(x(tick)) y="40" { (short_signed(tick)) }
                        }
                        line.zero x1=(x(0.0)) x2=(x(0.0)) y1="0" y2="28" {}
                        line class={ "interval " (class) } x1=(x(low)) x2=(x(high)) y1="14" y2="14" {}
                        circle class={ "dot " (class) } cx=(x(pair.f1_difference)) cy="14" r="5" {}
                    }
                    p.quiet {
                        "McNemar p " (p_value(pair.mcnemar_p)) "; they differ on " (pair.disagreements)
                        " rows, of which " (label(&pair.a)) " alone is right on " (pair.only_a_correct)
                        " and " (label(&pair.b)) " on " (pair.only_b_correct) "."
                    }
                }
            }
        }
    }
}

/// `+0.2`, `0`.
fn short_signed(tick: f64) -> String {
    match signed(tick).as_str() {
        "0.0000" => "0".into(),
        digits => digits.trim_end_matches('0').trim_end_matches('.').into(),
    }
}

fn verdict(pair: &Pair) -> Markup {
    let better = match pair.verdict {
        Verdict::A => &pair.a,
        Verdict::B => &pair.b,
        Verdict::Tie => return html! { "tie" },
    };
    html! { (label(better)) " is better" }
}
