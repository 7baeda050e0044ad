use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::canvas::{Area, BLUE, Canvas, GREEN, GREY, INK, LIGHT, ORANGE, SCALE, px, text};
use super::shorten;
use crate::dist::{Links, Prediction};
use crate::metrics::scaling::{Figures, Measured};
use crate::store;

const WIDTH: u32 = 1400;
const HEIGHT: u32 = 560;

/// Worlds as a Markdown table, a line for each.
pub fn scaling_table(worlds: &[(&Measured, Figures)]) -> String {
    let mut table = String::from(
        "| processes | threads | batch | tokens/s | sequences/s | GFLOP/s | of peak | efficiency | step | compute | \
         communication | waiting |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for (world, f) in worlds {
        let ms = |seconds: f64| format!("{:.1} ms", 1e3 * seconds);
        // Writing to a String cannot fail.
        let _ = writeln!(
            table,
            "| {} | {} | {} | {:.0} | {:.1} | {:.1} | {:.1} % | {:.3} | {} | {} | {} | {} |",
            world.world_size,
            world.threads,
            world.batch_size,
            f.tokens_per_second,
            f.sequences_per_second,
            f.flops / 1e9,
            100.0 * f.utilisation,
            f.efficiency,
            ms(f.step),
            ms(f.compute),
            ms(f.communication),
            ms(f.waiting),
        );
    }
    table
}

/// What is predicted for one kind of network, as a Markdown table with its assumptions above.
pub fn prediction_table(links: &Links, predictions: &[Prediction]) -> String {
    let mut table = format!(
        "{} GPUs a machine; {:.0} GB/s within and {:.1} µs a hop, {:.0} Gb/s between machines and {:.1} µs a hop\n\n\
         | GPUs | step | communication | of it exposed | efficiency | closed form |\n|---:|---:|---:|---:|---:|---:|\n",
        links.gpus_per_machine,
        links.within / 1e9,
        1e6 * links.latency_within,
        8.0 * links.between / 1e9,
        1e6 * links.latency_between,
    );
    for p in predictions {
        let _ = writeln!(
            table,
            "| {} | {:.2} ms | {:.2} ms | {:.2} ms | {:.3} | {:.3} |",
            p.world_size,
            1e3 * p.step,
            1e3 * p.communication,
            1e3 * p.exposed,
            p.efficiency,
            p.closed_form
        );
    }
    table
}

/// Draws tokens a second by world size beside the ideal, and where a step's time goes, as a PNG.
///
/// # Errors
/// Where the picture cannot be written.
pub fn scaling_plot(title: &str, worlds: &[(&Measured, Figures)], png: &Path) -> Result<()> {
    let mut canvas = Canvas::new(WIDTH, HEIGHT)?;
    draw(&canvas.area(), title, worlds).with_context(|| format!("cannot draw {}", png.display()))?;
    let bytes = canvas.png()?;
    store::write_bytes(png, &bytes)
}

fn draw(area: &Area, title: &str, worlds: &[(&Measured, Figures)]) -> Result<()> {
    let (header, body) = area.split_vertically(px(50));
    header.draw_text(&shorten(title, 110), &text(18.0, INK, HPos::Left), (px(24), px(30)))?;
    let (left, right) = body.margin(0, px(8), px(12), px(12)).split_horizontally(px(WIDTH as i32 / 2 - 12));
    rates(&left, worlds)?;
    times(&right, worlds)
}

/// Tokens a second, and what they would be if none were lost.
fn rates(area: &Area, worlds: &[(&Measured, Figures)]) -> Result<()> {
    let (row, body) = area.split_vertically(px(34));
    legend(&row, "Tokens/s", &[("measured", BLUE.to_rgba()), ("ideal", GREY.to_rgba())])?;
    let measured: Vec<_> = worlds.iter().map(|(world, f)| (world.world_size as f64, f.tokens_per_second)).collect();
    let ideal = worlds.iter().map(|(world, f)| (world.world_size as f64, f.tokens_per_second / f.efficiency));
    let ideal: Vec<_> = ideal.collect();
    let most = |points: &[(f64, f64)]| points.iter().fold((0.0f64, 0.0f64), |a, b| (a.0.max(b.0), a.1.max(b.1)));
    let ((x, ideally), (_, high)) = (most(&ideal), most(&measured));
    let top = 1.08 * ideally.max(high);
    let mut chart = ChartBuilder::on(&body)
        .margin_right(px(18))
        .margin_top(px(4))
        .x_label_area_size(px(40))
        .y_label_area_size(px(66))
        .build_cartesian_2d(0.0..x * 1.06, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(LIGHT.stroke_width(SCALE))
        .light_line_style(TRANSPARENT)
        .axis_style(GREY.stroke_width(SCALE))
        .label_style(("sans-serif", px(12), &GREY))
        .axis_desc_style(("sans-serif", px(12), &GREY))
        .set_all_tick_mark_size(px(4))
        .x_labels((x as usize).clamp(1, 8) + 1)
        .y_labels(8)
        .x_label_formatter(&|x| if x.fract() == 0.0 { format!("{x:.0}") } else { String::new() })
        .y_label_formatter(&|rate| if top < 1e4 { format!("{rate:.0}") } else { format!("{}k", rate / 1e3) })
        .x_desc("processes")
        .draw()?;
    chart.draw_series(DashedLineSeries::new(ideal, px(7), px(6), GREY.stroke_width(2 * SCALE)))?;
    chart.draw_series(LineSeries::new(measured.iter().copied(), BLUE.stroke_width(2 * SCALE)))?;
    chart.draw_series(measured.iter().map(|&at| Circle::new(at, px(4), BLUE.filled())))?;
    Ok(())
}

/// A bar for each world: computing alone, computing while communication goes on, waiting for it.
fn times(area: &Area, worlds: &[(&Measured, Figures)]) -> Result<()> {
    let parts = |f: &Figures| {
        let hidden = (f.communication - f.waiting).clamp(0.0, f.compute);
        [f.compute - hidden, hidden, f.waiting].map(|seconds| 1e3 * seconds)
    };
    let colors = [BLUE.to_rgba(), GREEN.to_rgba(), ORANGE.to_rgba()];
    let names = ["compute", "compute beside communication", "waiting"];
    let (row, body) = area.split_vertically(px(34));
    legend(&row, "A step's time, ms", &std::array::from_fn::<_, 3, _>(|i| (names[i], colors[i])))?;
    let high = worlds.iter().map(|(_, f)| parts(f).iter().sum::<f64>()).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(&body)
        .margin_right(px(18))
        .margin_top(px(4))
        .x_label_area_size(px(40))
        .y_label_area_size(px(66))
        .build_cartesian_2d((0..worlds.len().saturating_sub(1)).into_segmented(), 0.0..high * 1.08)?;
    let size = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(i) => worlds.get(*i).map_or_else(String::new, |(world, _)| world.world_size.to_string()),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(LIGHT.stroke_width(SCALE))
        .light_line_style(TRANSPARENT)
        .axis_style(GREY.stroke_width(SCALE))
        .label_style(("sans-serif", px(12), &GREY))
        .axis_desc_style(("sans-serif", px(12), &GREY))
        .set_all_tick_mark_size(px(4))
        .x_labels(worlds.len())
        .y_labels(8)
        .x_label_formatter(&size)
        .y_label_formatter(&|ms| format!("{ms:.0}"))
        .x_desc("processes")
        .draw()?;
    let side = px(150 / worlds.len().max(1) as i32);
    for (i, (_, f)) in worlds.iter().enumerate() {
        let mut from = 0.0;
        for (part, color) in parts(f).into_iter().zip(colors) {
            let corners = [(SegmentValue::Exact(i), from), (SegmentValue::Exact(i + 1), from + part)];
            let mut bar = Rectangle::new(corners, color.filled());
            bar.set_margin(0, 0, side as u32, side as u32);
            chart.draw_series(std::iter::once(bar))?;
            from += part;
        }
    }
    Ok(())
}

/// A panel's title, and its colours with their names, from the right.
fn legend(area: &Area, title: &str, entries: &[(&str, RGBAColor)]) -> Result<()> {
    let middle = px(18);
    area.draw_text(title, &text(15.0, INK, HPos::Left), (px(14), middle))?;
    let style = text(13.0, GREY, HPos::Right);
    let mut right = area.dim_in_pixel().0 as i32 - px(18);
    for (name, color) in entries.iter().rev() {
        area.draw_text(name, &style, (right, middle))?;
        let (width, _) = area.estimate_text_size(name, &style)?;
        let end = right - width as i32 - px(7);
        let swatch = [(end - px(14), middle - px(5)), (end, middle + px(5))];
        area.draw(&Rectangle::new(swatch, color.filled()))?;
        right = end - px(34);
    }
    Ok(())
}
