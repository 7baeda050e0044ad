//! What a run's files look like to a person: tables as text, curves and matrices as pictures.
//!
//! Everything here is made from metrics and from a run's files alone.

mod canvas;
mod comparison;
mod comparison_table;
mod confusion;
mod curves;
mod predictions;
mod scaling;
mod table;

pub(crate) use comparison::named;
pub use comparison::{Compared, Comparison, Contestant, Disagreement, Pair, Said, Verdict, compare};
pub use comparison_table::comparison_table;
pub use confusion::confusion;
pub use curves::curves;
pub use predictions::{Predicted, read_predictions};
pub use scaling::{prediction_table, scaling_plot, scaling_table};
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
