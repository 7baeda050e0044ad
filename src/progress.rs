//! How far long work has come, on stderr: a bar on a terminal, else a line now and then.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, stderr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

use crate::dashboard::Dashboard;
use crate::track::{Evaluation, Step};

/// Time between two lines where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Rate and remaining time are those of this last stretch of the work. A resumed run starts far
/// from zero, and machines change their pace: a mean since the start would mislead.
const WINDOW: Duration = Duration::from_secs(30);
/// Time between two reports that are kept for the rate.
const APART: Duration = Duration::from_millis(100);

/// Shows how far one piece of work has come. Many threads may report to it.
///
/// What is left of the bar goes away when this is finished or dropped, so that a message after it
/// stands on a line of its own.
pub struct Progress {
    label: String,
    total: u64,
    unit: String,
    shown: Shown,
    state: Mutex<State>,
}

enum Shown {
    Bar(ProgressBar),
    Lines,
    Dashboard(Dashboard),
    Nothing,
}

struct State {
    window: Window,
    /// When the last line was printed, or the work began.
    printed: Instant,
    any_printed: bool,
    message: String,
}

impl Progress {
    /// Starts to show `total` units of work ("step", "row"); nothing at all if `quiet`.
    pub fn new(label: &str, total: u64, unit: &str, quiet: bool) -> Self {
        let shown = if quiet {
            Shown::Nothing
        } else if stderr().is_terminal() {
            Shown::Bar(bar(label, total, unit))
        } else {
            Shown::Lines
        };
        Self::shown(label, total, unit, shown)
    }

    /// Starts to show a training of `total` steps on the whole terminal.
    ///
    /// # Errors
    /// What the terminal says.
    pub fn dashboard(label: &str, total: u64) -> io::Result<Self> {
        Ok(Self::shown(label, total, "step", Shown::Dashboard(Dashboard::new(label, total)?)))
    }

    fn shown(label: &str, total: u64, unit: &str, shown: Shown) -> Self {
        Self {
            label: label.to_owned(),
            total,
            unit: unit.to_owned(),
            shown,
            state: Mutex::new(State {
                window: Window::default(),
                printed: Instant::now(),
                any_printed: false,
                message: String::new(),
            }),
        }
    }

    /// Reports that `step` units in all are done, with what else there is to say about them.
    ///
    /// Work that starts in the middle says so first: `set(resumed_at, "")`.
    pub fn set(&self, step: u64, message: &str) {
        let now = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.window.push(now, step);
        match &self.shown {
            Shown::Nothing => {}
            Shown::Dashboard(dashboard) => {
                let left = self.total.saturating_sub(step);
                let seconds_left = state.window.rate().filter(|_| left > 0).map(|rate| left as f64 / rate);
                dashboard.update(|board| board.seconds_left = seconds_left);
            }
            Shown::Bar(bar) => {
                let text = describe(&state.window, self.total, &self.unit, message);
                bar.set_message(text);
                bar.set_position(step);
            }
            Shown::Lines => {
                message.clone_into(&mut state.message);
                if now.duration_since(state.printed) >= LINE_EVERY {
                    state.printed = now;
                    state.any_printed = true;
                    self.line(&state);
                }
            }
        }
    }

    /// Reports a step of a training.
    pub fn step(&self, step: &Step) {
        self.set(step.step, &format!("loss {:.3} · {:.0} tokens/s", step.train_loss, step.tokens_per_second));
        if let Shown::Dashboard(dashboard) = &self.shown {
            dashboard.update(|board| {
                board.loss.push(step.step as f64, step.train_loss);
                board.step = Some(step.clone());
            });
        }
    }

    /// Reports an evaluation, which `print` prints, with the bar out of its way.
    pub fn evaluation<T>(&self, evaluation: &Evaluation, print: impl FnOnce() -> T) -> T {
        if let Shown::Dashboard(dashboard) = &self.shown {
            dashboard.update(|board| board.evaluations.push(evaluation.clone()));
        }
        self.suspend(print)
    }

    /// Runs what prints by itself, with the bar out of its way.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.shown {
            Shown::Bar(bar) => bar.suspend(print),
            Shown::Dashboard(dashboard) => dashboard.suspend(print),
            Shown::Lines | Shown::Nothing => print(),
        }
    }

    /// Ends the work: the bar goes, and a log that has lines gets a last one.
    pub fn finish(self) {
        match &self.shown {
            Shown::Bar(bar) => bar.finish_and_clear(),
            Shown::Lines => {
                let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.any_printed {
                    self.line(&state);
                }
            }
            Shown::Dashboard(_) | Shown::Nothing => {} // the first goes as it is dropped
        }
    }

    fn line(&self, state: &State) {
        let Self { label, total, unit, .. } = self;
        let step = state.window.step();
        let text = describe(&state.window, *total, unit, &state.message);
        crate::error::say(format_args!(
            "{label} {step}/{total} {unit}s{}{text}",
            if text.is_empty() { "" } else { "  " }
        ));
    }
}

fn bar(label: &str, total: u64, unit: &str) -> ProgressBar {
    let template = "{prefix} {bar:16} {pos}/{len} {unit}s  {wide_msg}".replace("{unit}", unit);
    // A unit that is no template falls back to indicatif's own look.
    let style =
        ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─");
    ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        .with_style(style)
        .with_prefix(label.to_owned())
        .with_finish(ProgressFinish::AndClear)
}

/// `1:20 left · loss 0.1234 · 3.1 steps/s`: a narrow terminal cuts the end off, so what matters
/// most comes first.
fn describe(window: &Window, total: u64, unit: &str, message: &str) -> String {
    let rate = window.rate();
    let units_left = total.saturating_sub(window.step());
    let time_left = rate.filter(|_| units_left > 0).map(|rate| format!("{} left", clock(units_left as f64 / rate)));
    let message = (!message.is_empty()).then(|| message.to_owned());
    let rate = rate.map(|rate| match rate {
        r if r >= 100.0 => format!("{r:.0} {unit}s/s"),
        r if r >= 1.0 => format!("{r:.1} {unit}s/s"),
        r => format!("{r:.2} {unit}s/s"),
    });
    let parts: Vec<_> = [time_left, message, rate].into_iter().flatten().collect();
    parts.join(" · ")
}

/// `0:07`, `12:34`, `3:05:00`; days are hours.
pub(crate) fn clock(seconds: f64) -> String {
    let s = seconds.round() as u64; // saturates
    let (hours, minutes, seconds) = (s / 3600, s / 60 % 60, s % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

/// The reports of the last [`WINDOW`], and the one before them.
#[derive(Default)]
struct Window {
    reports: VecDeque<(Instant, u64)>,
}

impl Window {
    fn push(&mut self, now: Instant, step: u64) {
        if self.step() > step {
            self.reports.clear(); // the work went back: what was done before says nothing
        }
        let n = self.reports.len();
        if n >= 2 && self.reports[n - 1].0.duration_since(self.reports[n - 2].0) < APART {
            self.reports.pop_back(); // thousands of reports a second are as good as ten
        }
        self.reports.push_back((now, step));
        // The oldest report that is kept is at least as old as the window, so that work whose
        // units take longer than the window still has a rate.
        while self.reports.len() > 2 && now.duration_since(self.reports[1].0) >= WINDOW {
            self.reports.pop_front();
        }
    }

    fn step(&self) -> u64 {
        self.reports.back().map_or(0, |&(_, step)| step)
    }

    /// Units a second, where any were done.
    fn rate(&self) -> Option<f64> {
        let (&(from, first), &(to, last)) = (self.reports.front()?, self.reports.back()?);
        let seconds = to.duration_since(from).as_secs_f64();
        (last > first && seconds > 0.0).then(|| (last - first) as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(reports: &[(u64, u64)]) -> Window {
        let start = Instant::now();
        let mut window = Window::default();
        for &(seconds, step) in reports {
            window.push(start + Duration::from_secs(seconds), step);
        }
        window
    }

    #[test]
    fn a_resumed_run_has_the_rate_of_its_own_steps() {
        assert_eq!(window(&[(0, 5000)]).rate(), None);
        let w = window(&[(0, 5000), (2, 5001), (4, 5002)]);
        assert_eq!(w.rate(), Some(0.5));
        assert_eq!(describe(&w, 5062, "step", "loss 0.1234"), "2:00 left · loss 0.1234 · 0.50 steps/s");
        assert_eq!(describe(&w, 5002, "step", ""), "0.50 steps/s");
    }

    #[test]
    fn the_rate_follows_the_pace_of_the_last_half_minute() {
        let reports: Vec<_> = (0..=100).map(|t| (t, if t < 50 { t } else { 50 + (t - 50) * 10 })).collect();
        let w = window(&reports);
        assert_eq!(w.rate(), Some(10.0));
        assert!(w.reports.len() <= 32);
        // Units that take longer than the window.
        assert_eq!(window(&[(0, 0), (100, 1), (300, 2)]).rate(), Some(0.005));
    }

    #[test]
    fn many_reports_take_little_room() {
        let start = Instant::now();
        let mut w = Window::default();
        for i in 0..100_000 {
            w.push(start + Duration::from_millis(i), i);
        }
        assert!(w.reports.len() < 350, "{}", w.reports.len());
        assert!((w.rate().unwrap() - 1000.0).abs() < 1.0);
    }

    #[test]
    fn work_that_goes_back_starts_anew() {
        let w = window(&[(0, 0), (10, 100), (11, 10), (12, 11)]);
        assert_eq!(w.rate(), Some(1.0));
    }

    #[test]
    fn time_left_reads_like_a_clock() {
        assert_eq!([7.4, 754.0, 11100.0].map(clock), ["0:07", "12:34", "3:05:00"]);
    }
}
