//! What a run's files look like to a person: tables as text, curves and matrices as pictures,
//! and all of it as one page.
//!
//! Everything here is made from metrics and from a run's files alone.

mod axis;
mod canvas;
mod comparison;
mod comparison_table;
mod confusion;
mod curves;
mod html;
mod predictions;
mod runs_table;
mod scaling;
mod summary;
mod table;

pub(crate) use comparison::named;
pub use comparison::{Compared, Comparison, Contestant, Disagreement, Pair, Said, Verdict, compare};
pub use comparison_table::comparison_table;
pub use confusion::confusion;
pub use curves::curves;
pub use html::write_report;
pub use predictions::{Predicted, read_predictions};
pub use runs_table::runs_table;
pub use scaling::{prediction_table, scaling_plot, scaling_table};
pub use summary::{Best, Summary, Test};
pub use table::table;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// A label in at most `columns` columns on one line: a longer one ends in "…".
fn shorten(label: &str, columns: usize) -> String {
    let line: String = label.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.width() <= columns {
        return line;
    }
    let mut width = 1; // the ellipsis
    let mut short: String = line
        .chars()
        .take_while(|c| {
            width += c.width().unwrap_or(0);
            width <= columns
        })
        .collect();
    short.truncate(short.trim_end().len());
    short.push('…');
    short
}

/// A moment, in seconds since 1970, in UTC by chrono's `format`.
fn date(seconds: u64, format: &str) -> String {
    let moment = i64::try_from(seconds).ok().and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    moment.map_or_else(|| format!("{seconds} s after 1970"), |moment| moment.format(format).to_string())
}
