use maud::{Markup, html};

use super::chart::place;
use super::{absent, figure};
use crate::metrics::{Bin, Calibration, Statistics};

/// The picture's side and the plot's edges in it, in SVG units.
const SIDE: f64 = 300.0;
const LEFT: f64 = 40.0;
const RIGHT: f64 = 290.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 260.0;

const COLUMNS: [&str; 5] = ["above", "up to", "rows", "confidence", "accuracy"];

/// Whether the model is right as often as it says.
pub fn section(statistics: &Statistics, part: &str) -> Markup {
    let Some(calibration) = &statistics.calibration else {
        return absent("Calibration", "statistics.json has no probabilities to judge.");
    };
    let Calibration { ece, ece_scaled, temperature, reliability } = calibration;
    html! {
        h3 { "Calibration" }
        div.beside {
            figure.reliability {
                (diagram(reliability))
                figcaption {
                    "How often the model was right (bars), by the probability it gave, on the " (part)
                    " part. On the diagonal it is as good as its word; darker bars hold more rows."
                }
            }
            div {
                dl.figures {
                    div { dt { "ECE as it comes" } dd { (figure(*ece)) } }
                    @if let (Some(scaled), Some(temperature)) = (ece_scaled, temperature) {
                        div { dt { "ECE at the temperature" } dd { (figure(*scaled)) } }
                        div { dt { "temperature" } dd { (format!("{temperature:.3}")) } }
                    }
                }
                p.quiet {
                    "The expected calibration error is the mean gap between bars and diagonal, weighted by rows. "
                    @match temperature {
                        Some(t) if *t > 1.0 => { "A temperature above 1 says that the model is too sure of itself." }
                        Some(_) => { "A temperature below 1 says that the model is right more often than it says." }
                        None => { "The model has no temperature." }
                    }
                }
                details { summary { "The bins as a table" } (table(reliability)) }
            }
        }
    }
}

fn diagram(bins: &[Bin]) -> Markup {
    let x = |share: f64| place(LEFT + share * (RIGHT - LEFT));
    let y = |share: f64| place(BOTTOM - share * (BOTTOM - TOP));
    let most = bins.iter().map(|bin| bin.count).max().unwrap_or(0).max(1);
    let filled = || bins.iter().filter(|bin| bin.count > 0);
    html! {
        svg viewBox={ "0 0 " (SIDE) " " (SIDE) } role="img" aria-label="Reliability diagram: accuracy by confidence" {
            @for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
                line.grid x1=(LEFT) x2=(RIGHT) y1=(y(share)) y2=(y(share)) {}
                text.tick.y x=(LEFT - 7.0) y=(y(share) + 3.5) { (format!("{share:.2}")) }
                text.tick.x x=(x(share)) y=(BOTTOM + 16.0) { (format!("{share:.2}")) }
            }
            @for bin in filled() {
                // The eye reads areas: a bin of a hundredth of the rows is a tenth as dark.
                @let dark = 0.15 + 0.75 * (bin.count as f64 / most as f64).sqrt();
                rect.bin x=(x(bin.lower) + 1.0) width=(place(x(bin.upper) - x(bin.lower) - 2.0)) y=(y(bin.accuracy))
                    height=(place(BOTTOM - y(bin.accuracy))) fill-opacity=(format!("{dark:.2}")) {
                    title {
                        (bin.count) " rows at " (figure(bin.confidence)) ": right on " (figure(bin.accuracy))
                    }
                }
            }
            line.diagonal x1=(LEFT) y1=(BOTTOM) x2=(RIGHT) y2=(TOP) {}
            line.axis x1=(LEFT) x2=(RIGHT) y1=(BOTTOM) y2=(BOTTOM) {}
            text.tick.x x=((LEFT + RIGHT) / 2.0) y=(SIDE - 8.0) { "confidence" }
        }
    }
}

fn table(bins: &[Bin]) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label="Bins" {
            table {
                thead { tr {
                    @for name in COLUMNS { th.number scope="col" { (name) } }
                } }
                tbody {
                    @for bin in bins.iter().filter(|bin| bin.count > 0) {
                        tr {
                            td.number { (format!("{:.3}", bin.lower)) }
                            td.number { (format!("{:.3}", bin.upper)) }
                            td.number { (bin.count) }
                            td.number { (figure(bin.confidence)) }
                            td.number { (figure(bin.accuracy)) }
                        }
                    }
                }
            }
        }
    }
}
