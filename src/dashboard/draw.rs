//! The board as a picture: from 40 × 10 up it all fits, below that what comes first does.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, BorderType, Borders, Chart, Dataset, GraphType, LineGauge, Paragraph};

use super::board::Board;
use crate::progress::clock;

/// From this width on, two charts stand side by side.
const WIDE: u16 = 72;
/// From this height on, what is known stands in lines of its own.
const HIGH: u16 = 16;

/// Charts below this height have no frame.
const LOW: u16 = 7;

/// A curve: its name, its points, its colour.
type Drawn<'a> = (&'a str, &'a [(f64, f64)], Color);

/// Draws all of it.
pub fn draw(frame: &mut Frame<'_>, board: &Board) {
    let area = frame.area();
    let figures = figures(board, area.width, area.height >= HIGH);
    let rows = [
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(figures.len() as u16),
        Constraint::Length(1),
    ];
    let [title, gauge, charts, below, keys] = Layout::vertical(rows).areas(area);
    draw_title(frame, title, board);
    draw_gauge(frame, gauge, board);
    if charts.height >= 3 {
        draw_charts(frame, charts, board);
    }
    frame.render_widget(Paragraph::new(figures), below);
    frame.render_widget(Paragraph::new(hint(board, area.width)), keys);
}

fn draw_title(frame: &mut Frame<'_>, area: Rect, board: &Board) {
    let name = Span::styled(format!(" {}", board.label), Style::new().add_modifier(Modifier::BOLD));
    frame.render_widget(Paragraph::new(name), area);
    let epoch = board.step.as_ref().map_or("starting ".into(), |step| format!("epoch {:.2} ", step.epoch));
    let width = (board.label.chars().count() + 3) as u16;
    if area.width > width + epoch.len() as u16 {
        frame.render_widget(Paragraph::new(epoch).alignment(Alignment::Right), area);
    }
}

fn draw_gauge(frame: &mut Frame<'_>, area: Rect, board: &Board) {
    let step = board.step.as_ref().map_or(0, |step| step.step);
    let left = board.seconds_left.map(|seconds| format!(" {} left ", clock(seconds))).unwrap_or_default();
    let [line, left_area] = Layout::horizontal([Constraint::Min(0), Constraint::Length(left.len() as u16)]).areas(area);
    let gauge = LineGauge::default()
        .ratio((step as f64 / board.total.max(1) as f64).clamp(0.0, 1.0))
        .label(format!(" {step}/{} steps", board.total))
        .filled_symbol("━")
        .unfilled_symbol("─")
        .filled_style(colour(board, Color::Green))
        .unfilled_style(colour(board, Color::DarkGray));
    frame.render_widget(gauge, line);
    frame.render_widget(Paragraph::new(left), left_area);
}

fn draw_charts(frame: &mut Frame<'_>, area: Rect, board: &Board) {
    let validation = |of: fn(&crate::track::Evaluation) -> f64| -> Vec<(f64, f64)> {
        let points = board.evaluations.iter().map(|evaluation| (evaluation.step as f64, of(evaluation)));
        points.filter(|(_, y)| y.is_finite()).collect()
    };
    let (losses, f1) = (validation(|e| e.validation_loss), validation(|e| e.validation_macro_f1));
    let loss: [Drawn<'_>; 2] = [("train", board.loss.points(), Color::Cyan), ("validation", &losses, Color::Yellow)];
    let f1: [Drawn<'_>; 1] = [("", &f1, Color::Green)];
    if area.width >= WIDE {
        let [left, right] = Layout::horizontal([Constraint::Fill(3), Constraint::Fill(2)]).areas(area);
        draw_chart(frame, left, board, "loss", &loss, None);
        draw_chart(frame, right, board, "validation macro F1", &f1, Some(1.0));
    } else if area.height >= 14 {
        let [top, bottom] = Layout::vertical([Constraint::Fill(1); 2]).areas(area);
        draw_chart(frame, top, board, "loss", &loss, None);
        draw_chart(frame, bottom, board, "validation macro F1", &f1, Some(1.0));
    } else {
        draw_chart(frame, area, board, "loss", &loss, None);
    }
}

fn draw_chart(frame: &mut Frame<'_>, area: Rect, board: &Board, title: &str, curves: &[Drawn<'_>], most: Option<f64>) {
    // A low chart has no frame and no steps below, but a curve.
    let low = area.height < LOW;
    let block = Block::new()
        .borders(if low { Borders::TOP } else { Borders::ALL })
        .border_type(BorderType::Rounded)
        .border_style(colour(board, Color::DarkGray))
        .title(format!(" {title} "));
    let all = || curves.iter().flat_map(|(_, points, _)| points.iter());
    let Some(top) = all().map(|(_, y)| *y).reduce(f64::max) else {
        let wait = Paragraph::new("none yet").alignment(Alignment::Center).style(colour(board, Color::DarkGray));
        return frame.render_widget(wait.block(block), area);
    };
    let bottom = all().map(|(_, y)| *y).reduce(f64::min).unwrap_or(top);
    let margin = ((top - bottom) * 0.05).max(1e-3);
    let bottom = (bottom - margin).max(0.0);
    let top = (top + margin).min(most.unwrap_or(f64::INFINITY)).max(bottom + 1e-3);
    let first = all().map(|(x, _)| *x).reduce(f64::min).unwrap_or(0.0);
    let last = board.step.as_ref().map_or(first, |step| step.step as f64).max(first + 1.0);
    let datasets = curves.iter().filter(|(_, points, _)| !points.is_empty()).map(|(name, points, curve_colour)| {
        let dataset = Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).data(points);
        let dataset = if name.is_empty() { dataset } else { dataset.name(*name) };
        dataset.style(colour(board, *curve_colour))
    });
    let labels = |values: [f64; 2], digits: usize| values.map(|value| format!("{value:.digits$}"));
    let grey = colour(board, Color::DarkGray);
    let steps = if low { Vec::new() } else { labels([first, last], 0).to_vec() };
    let chart = Chart::new(datasets.collect())
        .block(block)
        .x_axis(Axis::default().bounds([first, last]).labels(steps).style(grey))
        .y_axis(Axis::default().bounds([bottom, top]).labels(labels([bottom, top], 3)).style(grey))
        .hidden_legend_constraints((Constraint::Percentage(60), Constraint::Percentage(60)));
    frame.render_widget(chart, area);
}

/// What is known, as many lines as there is height for.
fn figures(board: &Board, width: u16, high: bool) -> Vec<Line<'static>> {
    let mut now = Vec::new();
    if let Some(step) = &board.step {
        now.push(format!("loss {:.4}", step.train_loss));
        now.push(format!("{} tokens/s", thousands(step.tokens_per_second)));
    }
    match board.memory {
        (Some(resident), Some(limit)) => {
            now.push(format!("memory {:.2} of {:.1} GB", resident as f64 / 1e9, limit as f64 / 1e9));
        }
        (Some(resident), None) => now.push(format!("memory {:.2} GB", resident as f64 / 1e9)),
        _ => {}
    }
    if let Some(step) = &board.step {
        now.push(format!("learning rate {:.2e}", step.learning_rate));
        now.push(format!("gradient {:.2}", step.grad_norm));
    }
    let mut best = Vec::new();
    match board.evaluations.last() {
        Some(last) => {
            best.push(format!("macro F1 {:.4}", last.validation_macro_f1));
            best.push(format!("loss {:.4}", last.validation_loss));
            best.push(format!("at step {}{}", last.step, if last.best { ", the best" } else { "" }));
            best.push(format!("accuracy {:.4}", last.validation_accuracy));
        }
        None => best.push("no evaluation yet".into()),
    }
    if !high && width < WIDE {
        now.truncate(2);
    }
    vec![line(" now         ", now, width), line(" validation  ", best, width)]
}

/// As many parts as fit.
fn line(name: &'static str, parts: Vec<String>, width: u16) -> Line<'static> {
    let mut text = String::new();
    let name = if width < WIDE { " " } else { name };
    for part in parts {
        let more = if text.is_empty() { part } else { format!(" · {part}") };
        if name.len() + text.chars().count() + more.chars().count() > width.into() {
            break;
        }
        text += &more;
    }
    Line::from(vec![Span::styled(name, Style::new().add_modifier(Modifier::DIM)), Span::raw(text)])
}

fn hint(board: &Board, width: u16) -> Line<'static> {
    let text = match (board.ending, width >= WIDE) {
        (true, true) => " ending: a checkpoint is written after this step; again to end at once",
        (true, false) => " ending with a checkpoint",
        (false, true) => " q or Ctrl-C ends with a checkpoint, and the same command goes on from there",
        (false, false) => " q ends with a checkpoint",
    };
    Line::styled(text, if board.ending { colour(board, Color::Yellow) } else { colour(board, Color::DarkGray) })
}

fn colour(board: &Board, colour: Color) -> Style {
    if board.plain { Style::new() } else { Style::new().fg(colour) }
}

/// `41,200`
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
