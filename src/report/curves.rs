use std::path::Path;

use anyhow::{Context, Result, bail};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::axis::{
    SMOOTH_FROM, count, counted, decimal, finite, loss_axis, rate_axis, scientific, score_axis, short, smoothed,
};
use super::canvas::{Area, BLUE, Canvas, GREEN, GREY, INK, LIGHT, ORANGE, SCALE, px, text};
use super::shorten;
use crate::store;
use crate::track::{self, Evaluation, Event, Step};

const WIDTH: u32 = 1400;
const HEIGHT: u32 = 960;
/// With more evaluations than this their dots would hide the line.
const MOST_DOTS: usize = 60;

/// Draws a training's loss, learning rate, accuracy and F1s over its steps, as a PNG of four panels.
///
/// `metrics` is a `metrics.jsonl`; values in it that are not finite are left out.
///
/// # Errors
/// Where the file cannot be read or holds no event, or the picture cannot be written.
pub fn curves(metrics: &Path, png: &Path) -> Result<()> {
    let (mut steps, mut evaluations) = (Vec::new(), Vec::new());
    for event in track::read(metrics)? {
        match event {
            Event::Step(step) => steps.push(step),
            Event::Evaluation(evaluation) => evaluations.push(evaluation),
            Event::Start(_) | Event::Test(_) | Event::End(_) => {}
        }
    }
    if steps.is_empty() && evaluations.is_empty() {
        bail!("{} holds no event yet: there is nothing to draw", metrics.display());
    }
    let name =
        metrics.parent().and_then(Path::file_name).map_or_else(String::new, |name| name.to_string_lossy().into_owned());

    let mut canvas = Canvas::new(WIDTH, HEIGHT)?;
    draw(&canvas.area(), &name, &steps, &evaluations).with_context(|| format!("cannot draw {}", png.display()))?;
    let bytes = canvas.png()?;
    store::write_bytes(png, &bytes)
}

fn draw(area: &Area, name: &str, steps: &[Step], evaluations: &[Evaluation]) -> Result<()> {
    let best = evaluations.iter().rfind(|e| e.best);
    let last_step = steps.last().map(|s| s.step);
    let last_evaluated = evaluations.last().map(|e| e.step);
    let x_end = last_step.max(last_evaluated).unwrap_or(0).max(1);

    let of_steps = |value: fn(&Step) -> f64| -> Vec<(u64, f64)> { steps.iter().map(|s| (s.step, value(s))).collect() };
    let evaluated = |name, color, dash, value: fn(&Evaluation) -> f64| Line {
        name: match best {
            Some(best) => format!("{name} {:.4}", value(best)),
            None => String::from(name),
        },
        color,
        dash,
        points: finite(evaluations.iter().map(|e| (e.step, value(e))).collect()),
        best: best.map(|e| (e.step, value(e))),
        dots: evaluations.len() <= MOST_DOTS,
        pale: false,
    };
    let measured = |name: &str, color, points| Line {
        name: String::from(name),
        color,
        dash: Dash::Solid,
        points: finite(points),
        best: None,
        dots: false,
        pale: false,
    };

    let mut losses = Vec::new();
    let train = measured("training", BLUE, of_steps(|s| s.train_loss));
    if train.points.len() >= SMOOTH_FROM {
        let smooth = measured("", BLUE, smoothed(&train.points));
        losses.push(Line { pale: true, ..train });
        losses.push(Line { name: String::from("training, smoothed"), ..smooth });
    } else {
        losses.push(train);
    }
    losses.push(evaluated("validation", ORANGE, Dash::Solid, |e| e.validation_loss));

    let panels = [
        Panel { title: "Loss", lines: losses, axis: loss_axis, label: decimal },
        Panel {
            title: "Learning rate",
            lines: vec![measured("", BLUE, of_steps(|s| s.learning_rate))],
            axis: rate_axis,
            label: scientific,
        },
        Panel {
            title: "Accuracy, validation",
            lines: vec![evaluated("accuracy", ORANGE, Dash::Solid, |e| e.validation_accuracy)],
            axis: score_axis,
            label: decimal,
        },
        Panel {
            title: "F1, validation",
            // Where they coincide, the dashed ones show the ones below through their gaps.
            lines: vec![
                evaluated("weighted", GREEN, Dash::Solid, |e| e.validation_weighted_f1),
                evaluated("micro", BLUE, Dash::Short, |e| e.validation_micro_f1),
                evaluated("macro", ORANGE, Dash::Long, |e| e.validation_macro_f1),
            ],
            axis: score_axis,
            label: decimal,
        },
    ];

    let (header, body) = area.split_vertically(px(56));
    self::header(&header, name, x_end, steps, evaluations, best)?;
    for (area, panel) in body.margin(0, px(10), px(12), px(12)).split_evenly((2, 2)).iter().zip(panels) {
        panel.draw(area, x_end, best.map(|e| e.step))?;
    }
    Ok(())
}

fn header(
    area: &Area,
    name: &str,
    x_end: u64,
    steps: &[Step],
    evaluations: &[Evaluation],
    best: Option<&Evaluation>,
) -> Result<()> {
    let middle = px(34);
    let title = text(20.0, INK, HPos::Left);
    let name = shorten(name, 40);
    area.draw_text(&name, &title, (px(24), middle))?;
    let (width, _) = area.estimate_text_size(&name, &title)?;

    let epoch = steps.last().map(|s| s.epoch).into_iter().chain(evaluations.last().map(|e| e.epoch));
    let epoch = epoch.fold(0.0, f64::max);
    let gap = if width > 0 { px(18) } else { 0 };
    area.draw_text(
        &format!("{}, {}", counted(x_end as f64, "step"), counted(epoch, "epoch")),
        &text(14.0, GREY, HPos::Left),
        (px(24) + width as i32 + gap, middle + px(2)),
    )?;

    let said = match best {
        Some(best) => format!("best evaluation: step {}, epoch {}", best.step, short(best.epoch)),
        None => String::from("not evaluated yet"),
    };
    let style = text(14.0, GREY, HPos::Right);
    let right = WIDTH as i32 * SCALE as i32 - px(26);
    area.draw_text(&said, &style, (right, middle + px(2)))?;
    if best.is_some() {
        let (width, _) = area.estimate_text_size(&said, &style)?;
        let x = right - width as i32 - px(18);
        let y = middle + px(2);
        for dash in [-12, -1, 10] {
            let ends = vec![(x, y + px(dash)), (x, y + px(dash + 5))];
            area.draw(&PathElement::new(ends, GREY.stroke_width(SCALE)))?;
        }
        for disc in ring((x, y + px(1)), GREY) {
            area.draw(&disc)?;
        }
    }
    Ok(())
}

struct Panel<'a> {
    title: &'a str,
    lines: Vec<Line>,
    /// The axis that shows values between these two.
    axis: fn(f64, f64) -> (f64, f64),
    /// A tick's label; the second number is the axis's length.
    label: fn(f64, f64) -> String,
}

struct Line {
    /// For the legend; nothing stands there for a line without a name.
    name: String,
    color: RGBColor,
    dash: Dash,
    points: Vec<(u64, f64)>, // step, value: finite
    best: Option<(u64, f64)>,
    dots: bool,
    pale: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Dash {
    Solid,
    Long,
    Short,
}

impl Dash {
    /// Pixels on and off.
    fn lengths(self) -> (i32, i32) {
        match self {
            Dash::Solid => (1, 0),
            Dash::Long => (9, 6),
            Dash::Short => (3, 4),
        }
    }
}

impl Line {
    fn style(&self) -> ShapeStyle {
        let width = if self.pale { SCALE } else { 2 * SCALE };
        self.color.mix(if self.pale { 0.35 } else { 1.0 }).stroke_width(width)
    }
}

impl Panel<'_> {
    fn draw(&self, area: &Area, x_end: u64, best: Option<u64>) -> Result<()> {
        let (title, body) = area.split_vertically(px(34));
        self.title_and_legend(&title)?;

        let values = || self.lines.iter().flat_map(|l| &l.points).map(|&(_, value)| value);
        let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        let any = low <= high;
        let (from, to) = if any { (self.axis)(low, high) } else { (0.0, 1.0) };

        let mut chart = ChartBuilder::on(&body)
            .margin_right(px(16))
            .margin_top(px(4))
            .x_label_area_size(px(38))
            .y_label_area_size(px(62))
            .build_cartesian_2d(0..x_end + x_end / 60, from..to)?;
        let label = |value: &f64| (self.label)(*value, to - from);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .bold_line_style(LIGHT.stroke_width(SCALE))
            .light_line_style(TRANSPARENT)
            .axis_style(GREY.stroke_width(SCALE))
            .label_style(("sans-serif", px(12), &GREY))
            .axis_desc_style(("sans-serif", px(12), &GREY))
            .set_all_tick_mark_size(px(4))
            .x_labels(8)
            .y_labels(if any { 8 } else { 0 })
            .x_label_formatter(&|step| count(*step))
            .y_label_formatter(&label)
            .x_desc("step")
            .draw()?;
        if !any {
            let (width, height) = body.dim_in_pixel();
            let style = text(14.0, GREY, HPos::Center);
            body.draw_text("nothing measured yet", &style, ((width as i32 + px(62)) / 2, height as i32 / 2))?;
            return Ok(());
        }

        if let Some(step) = best.filter(|_| self.lines.iter().any(|l| l.best.is_some())) {
            let ends = [(step, from), (step, to)];
            let style = GREY.stroke_width(SCALE);
            chart.draw_series(DashedLineSeries::new(ends, px(5), px(6), style))?;
        }
        for line in &self.lines {
            let points = line.points.iter().copied();
            let (on, off) = line.dash.lengths();
            if line.dash == Dash::Solid {
                chart.draw_series(LineSeries::new(points, line.style()))?;
            } else {
                chart.draw_series(DashedLineSeries::new(points, px(on), px(off), line.style()))?;
            }
            if line.dots || line.points.len() == 1 {
                let dots = line.points.iter().map(|&at| Circle::new(at, px(3), line.color.filled()));
                chart.draw_series(dots)?;
            }
        }
        // Over all lines, so that none hides a mark.
        for line in &self.lines {
            if let Some(at) = line.best.filter(|(_, value)| value.is_finite()) {
                chart.draw_series(ring(at, line.color))?;
            }
        }
        Ok(())
    }

    /// One row above the plot, so that the legend hides no line.
    fn title_and_legend(&self, area: &Area) -> Result<()> {
        let middle = px(18);
        area.draw_text(self.title, &text(15.0, INK, HPos::Left), (px(14), middle))?;
        let style = text(13.0, GREY, HPos::Right);
        let mut right = area.dim_in_pixel().0 as i32 - px(16);
        for line in self.lines.iter().filter(|l| !l.name.is_empty()) {
            area.draw_text(&line.name, &style, (right, middle))?;
            let (width, _) = area.estimate_text_size(&line.name, &style)?;
            let end = right - width as i32 - px(7);
            let start = end - px(24);
            let (on, off) = line.dash.lengths();
            let mut x = start;
            while x < end {
                let to = if off == 0 { end } else { (x + px(on)).min(end) };
                area.draw(&PathElement::new(vec![(x, middle), (to, middle)], line.style()))?;
                x = to + px(off).max(1);
            }
            right = start - px(20);
        }
        Ok(())
    }
}

/// The mark of the best evaluation.
fn ring<C: Clone>(at: C, color: RGBColor) -> impl Iterator<Item = Circle<C, i32>> {
    let disc = move |radius, color: RGBColor| Circle::new(at.clone(), px(radius), color.filled());
    [(6, color), (4, WHITE), (2, color)].into_iter().map(move |(radius, color)| disc(radius, color))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Training files from an unlucky day: each draws, none panics.
    #[test]
    fn draws_what_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let (metrics, png) = (dir.path().join("metrics.jsonl"), dir.path().join("curves.png"));
        let step = |n: u64, loss: &str| {
            format!(
                "{{\"event\":\"step\",\"step\":{n},\"epoch\":0.5,\"train_loss\":{loss},\"learning_rate\":0.0,\
                 \"grad_norm\":null,\"tokens_per_second\":1.0}}\n"
            )
        };
        let evaluation = |n: u64, best: bool| {
            format!(
                "{{\"event\":\"evaluation\",\"step\":{n},\"epoch\":1.0,\"train_loss\":0.1,\"validation_loss\":null,\
                 \"validation_accuracy\":1.0,\"validation_macro_f1\":1.0,\"validation_micro_f1\":1.0,\
                 \"validation_weighted_f1\":0.0,\"best\":{best}}}\n"
            )
        };
        for text in [
            step(1, "0.5"),
            step(1, "null"),
            step(0, "1e300"),
            evaluation(1, true),
            evaluation(0, false) + &step(18_000_000_000, "0.0") + "{\"eve",
            (0..200).map(|n| step(n, "-1.0")).collect(),
        ] {
            fs::write(&metrics, &text).unwrap();
            curves(&metrics, &png).unwrap();
            assert!(fs::read(&png).unwrap().starts_with(b"\x89PNG"), "{text}");
        }
        fs::write(&metrics, "").unwrap();
        let error = curves(&metrics, &png).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl holds no event yet"), "{error}");
    }
}
