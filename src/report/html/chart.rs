//! A line chart as SVG in the page: it reads without a script, and a script adds what is under the pointer.

use std::fmt::Write as _;

use maud::{Markup, html};

use crate::report::axis::count;

/// The picture's size and the plot's edges in it, in SVG units.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 410.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 198.0;
/// With more points than this a line is thinned: a screen has no more columns.
const MOST_POINTS: usize = 400;
/// With more points than this their dots would hide the line.
const MOST_DOTS: usize = 40;

/// A chart over optimizer steps.
pub struct Chart<'a> {
    /// What stands over it.
    pub title: &'a str,
    /// What it shows.
    pub lines: Vec<Line<'a>>,
    /// The axis that shows values between these two.
    pub axis: fn(f64, f64) -> (f64, f64),
    /// A value's label; the second number is the axis's length.
    pub label: fn(f64, f64) -> String,
    /// Where the x axis ends.
    pub last_step: u64,
    /// The step of the best evaluation.
    pub best: Option<u64>,
}

/// One line of a [`Chart`].
pub struct Line<'a> {
    /// For the legend and the read-out; a line without a name is in neither.
    pub name: &'a str,
    /// The class that gives it colour and dashes.
    pub class: &'a str,
    /// By ascending step; a value that is not finite breaks the line.
    pub points: Vec<(u64, f64)>,
    /// Whether each point gets a dot.
    pub dots: bool,
}

impl Chart<'_> {
    /// The chart, or a line that says there is nothing to draw.
    pub fn render(&self) -> Markup {
        let values = || self.lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value);
        let finite = || values().filter(|value| value.is_finite());
        let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
        let (from, to) = (self.axis)(low, high);
        let drawn = low <= high && (to - from).is_finite();
        html! {
            figure.chart {
                figcaption {
                    span.title { (self.title) }
                    @if drawn { @for line in &self.lines { (self.legend(line, to - from)) } }
                }
                @if drawn {
                    (self.picture(from, to))
                    p.readout aria-hidden="true" {}
                } @else {
                    p.absent { "Nothing was measured." }
                }
            }
        }
    }

    /// A line's name and its value at the best evaluation, else its last.
    fn legend(&self, line: &Line<'_>, axis: f64) -> Markup {
        let at_best = line.points.iter().find(|(step, _)| Some(*step) == self.best);
        let value = at_best.or(line.points.last()).map(|(_, value)| *value).filter(|value| value.is_finite());
        html! {
            @if !line.name.is_empty() {
                span.key { span class={ "swatch " (line.class) } {} (line.name)
                    @if let Some(value) = value { " " b { (self.precise(value, axis)) } }
                }
            }
        }
    }

    /// A value as it is read out: finer than the axis.
    fn precise(&self, value: f64, axis: f64) -> String {
        if axis > 1e-2 && axis < 1e5 { format!("{value:.4}") } else { (self.label)(value, axis) }
    }

    fn picture(&self, from: f64, to: f64) -> Markup {
        let end = self.last_step.max(1) as f64;
        let x = |step: f64| LEFT + step / end * (RIGHT - LEFT);
        let y = |value: f64| BOTTOM - (value - from) / (to - from) * (BOTTOM - TOP);
        let steps = ticks(0.0, end, 6);
        let names = self.lines.iter().map(|line| line.name).filter(|name| !name.is_empty());
        let label = format!("{} by optimizer step: {}", self.title, names.collect::<Vec<_>>().join(", "));
        html! {
            svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(label) tabindex="0"
                data-left=(LEFT) data-right=(RIGHT) data-end=(self.last_step.max(1)) {
                @for tick in ticks(from, to, 6) {
                    line.grid x1=(LEFT) x2=(RIGHT) y1=(place(y(tick))) y2=(place(y(tick))) {}
                    text.tick.y x=(LEFT - 7.0) y=(place(y(tick) + 3.5)) { ((self.label)(tick, to - from)) }
                }
                line.axis x1=(LEFT) x2=(RIGHT) y1=(BOTTOM) y2=(BOTTOM) {}
                @for tick in steps.iter().filter(|tick| tick.fract() == 0.0) {
                    text.tick.x x=(place(x(*tick))) y=(BOTTOM + 16.0) { (count(*tick as u64)) }
                }
                text.tick.x x=((LEFT + RIGHT) / 2.0) y=(HEIGHT - 2.0) { "step" }
                @if let Some(best) = self.best {
                    line.best x1=(place(x(best as f64))) x2=(place(x(best as f64))) y1=(TOP) y2=(BOTTOM) {}
                }
                @for line in &self.lines {
                    @let points = thinned(&line.points);
                    path class={ "line " (line.class) } d=(path(&points, x, y))
                        data-name=[(!line.name.is_empty()).then_some(line.name)]
                        data-points=[(!line.name.is_empty()).then(|| self.read_out(&points, to - from))] {}
                    @if line.dots && points.len() <= MOST_DOTS || points.len() == 1 {
                        @for &(step, value) in points.iter().filter(|(_, value)| value.is_finite()) {
                            circle class={ "dot " (line.class) } cx=(place(x(step as f64))) cy=(place(y(value)))
                                r=(if Some(step) == self.best { "4" } else { "2.2" }) {}
                        }
                    }
                }
                line.cursor x1=(LEFT) x2=(LEFT) y1=(TOP) y2=(BOTTOM) {}
            }
        }
    }

    /// `step:value step:value …`, for the script.
    fn read_out(&self, points: &[(u64, f64)], axis: f64) -> String {
        let finite = points.iter().filter(|(_, value)| value.is_finite());
        let said: Vec<String> = finite.map(|&(step, value)| format!("{step}:{}", self.precise(value, axis))).collect();
        said.join(" ")
    }
}

/// An SVG path through the points; a value that is not finite lifts the pen.
fn path(points: &[(u64, f64)], x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) -> String {
    let mut path = String::new();
    let mut down = false;
    for &(step, value) in points {
        if value.is_finite() {
            let command = if down { 'L' } else { 'M' };
            // Writing to a String cannot fail.
            let _ = write!(path, "{command}{} {}", place(x(step as f64)), place(y(value)));
        }
        down = value.is_finite();
    }
    path
}

/// A coordinate, to a tenth: a screen shows no more.
pub fn place(at: f64) -> f64 {
    (at * 10.0).round() / 10.0
}

/// At most [`MOST_POINTS`] points: of neighbours the mean of what is finite, at the last one's step.
fn thinned(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let mean = |near: &[(u64, f64)]| {
        let finite = || near.iter().map(|(_, value)| *value).filter(|value| value.is_finite());
        let mean = finite().sum::<f64>() / finite().count() as f64; // of none NaN
        near.last().map(|(step, _)| (*step, mean))
    };
    points.chunks(points.len().div_ceil(MOST_POINTS)).filter_map(mean).collect()
}

/// Round numbers from `from` to `to`, about `count` of them.
pub fn ticks(from: f64, to: f64, count: u32) -> Vec<f64> {
    let rough = (to - from) / f64::from(count);
    if !(rough.is_finite() && rough > 0.0) {
        return Vec::new();
    }
    let magnitude = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|round| round * magnitude).into_iter().find(|&step| step >= rough * 0.999);
    let step = step.unwrap_or(rough);
    let (first, last) = ((from / step).ceil(), (to / step + 1e-9).floor());
    if !(first.is_finite() && last - first < 100.0) {
        return Vec::new();
    }
    (0..=(last - first).max(0.0) as u32).map(|i| (first + f64::from(i)) * step).filter(|tick| *tick <= to).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::axis::{decimal, loss_axis};

    fn chart(points: &[(u64, f64)]) -> String {
        let line = Line { name: "training", class: "blue", points: points.to_vec(), dots: true };
        let last_step = points.last().map_or(0, |(step, _)| *step);
        Chart { title: "Loss", lines: vec![line], axis: loss_axis, label: decimal, last_step, best: Some(2) }
            .render()
            .into_string()
    }

    #[test]
    fn what_is_not_finite_lifts_the_pen() {
        let same = |at: f64| at;
        let points = [(0, 1.0), (1, f64::NAN), (2, 3.0), (3, 4.04), (4, f64::INFINITY)];
        assert_eq!(path(&points, same, same), "M0 1M2 3L3 4");
        assert_eq!(path(&[], same, same), "");
        let page = chart(&points);
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
        assert!(page.contains(r#"data-points="0:1.0000 2:3.0000 3:4.0400""#), "{page}");
        assert!(page.contains("training <b>3.0000</b>"), "the best evaluation's value: {page}");
    }

    #[test]
    fn nothing_to_draw_is_said() {
        for points in [&[][..], &[(1, f64::NAN)], &[(1, f64::MAX), (2, -f64::MAX)]] {
            let page = chart(points);
            assert!(page.contains("Nothing was measured") && !page.contains("<svg"), "{page}");
        }
        assert!(chart(&[(0, 0.0)]).contains("<svg") && chart(&[(18_000_000_000, 1e300)]).contains("<svg"));
    }

    #[test]
    fn a_long_line_is_thinned_to_means() {
        let points: Vec<_> = (1..=4000).map(|i| (i, if i % 10 == 0 { f64::NAN } else { 7.0 })).collect();
        let thin = thinned(&points);
        assert_eq!((thin.len(), thin[0], thin[399]), (400, (10, 7.0), (4000, 7.0)));
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(ticks(0.0, 1.0, 5), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(0.0, 240.0, 6), [0.0, 50.0, 100.0, 150.0, 200.0]);
        assert_eq!(ticks(0.0, 0.0, 6), [0.0; 0]);
        assert!(ticks(1e17, 1e17 + 16.0, 6).len() < 100);
    }
}
