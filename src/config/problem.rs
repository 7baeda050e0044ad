//! What is wrong with an experiment file, and how it is shown.

use std::fmt::{self, Write as _};
use std::ops::Range;

use super::document::At;

/// Mistakes that are shown at most: a file that is something else altogether has one on each line.
pub(super) const SHOWN: usize = 50;

/// One mistake and where it is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Problem {
    at: At,
    message: String,
    allowed: Option<String>,
}

impl Problem {
    pub fn new(at: At, message: impl Into<String>) -> Self {
        Self { at, message: message.into(), allowed: None }
    }

    /// Adds a last line with what could stand there.
    pub fn allowed(mut self, keys: &[&str]) -> Self {
        self.allowed = Some(keys.join(", "));
        self
    }

    fn show(&self, file: &str, text: &str) -> String {
        let mut shown = match &self.at {
            At::Flag(flag) => format!("{flag}: {}", self.message),
            At::File(span) => {
                let place = Place::of(text, span);
                let margin = " ".repeat(place.line.to_string().len());
                format!(
                    "{file}:{line}:{column}: {message}\n{margin} |\n{line} | {source}\n{margin} | {indent}{carets}",
                    line = place.line,
                    column = place.column,
                    message = self.message,
                    source = place.source,
                    indent = place.indent,
                    carets = "^".repeat(place.width),
                )
            }
        };
        if let Some(allowed) = &self.allowed {
            let _ = write!(shown, "\n  = allowed: {allowed}");
        }
        shown
    }
}

/// Every mistake found in an experiment file and the options laid over it.
///
/// Shown, each says the place (`file:line:column`, or the option), what was got, what is allowed,
/// and the source line.
#[derive(Debug)]
pub struct ConfigError {
    file: String,
    text: String,
    problems: Vec<Problem>,
    /// Whether there are others.
    more: bool,
}

impl ConfigError {
    pub(super) fn new(file: &str, text: &str, mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| match &problem.at {
            At::File(span) => span.start,
            At::Flag(_) => usize::MAX,
        });
        // [train] is read once for itself and once for each model.
        let mut unique: Vec<Problem> = Vec::new();
        let mut more = false;
        for problem in problems {
            if unique.contains(&problem) {
                continue;
            }
            more = unique.len() == SHOWN;
            if more {
                break;
            }
            unique.push(problem);
        }
        Self { file: file.to_owned(), text: text.to_owned(), problems: unique, more }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let between = if index == 0 { "" } else { "\n" };
            write!(f, "{between}{}", problem.show(&self.file, &self.text))?;
        }
        if self.more { write!(f, "\nand there are more; put these right first") } else { Ok(()) }
    }
}

impl std::error::Error for ConfigError {}

/// A span as a person counts: lines and characters from 1.
struct Place<'a> {
    line: usize,
    column: usize,
    source: &'a str,
    /// What stands before the span, blank, tabs kept, so that carets line up.
    indent: String,
    width: usize,
}

impl<'a> Place<'a> {
    fn of(text: &'a str, span: &Range<usize>) -> Self {
        let start = text.floor_char_boundary(span.start.min(text.len()));
        let end = text.floor_char_boundary(span.end.clamp(start, text.len()));
        let from = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let to = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        let before = &text[from..start];
        Self {
            line: text[..from].matches('\n').count() + 1,
            column: before.chars().count() + 1,
            source: text[from..to].trim_end(),
            indent: before.chars().map(|c| if c == '\t' { '\t' } else { ' ' }).collect(),
            width: text[start..end.min(to)].trim_end().chars().count().max(1),
        }
    }
}
