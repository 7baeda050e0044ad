//! Where the time of some steps went: trace.json, in the Trace Event Format that Perfetto and Chrome open.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use kiln_models::nn::trace::{self, Level, Span, Trace};
use serde_json::{Value, json};

use crate::error::warn;
use crate::store;

/// A profile that is being taken: every span of some steps, and of the others what is rare.
pub struct Profile {
    steps: Range<u64>,
    path: PathBuf,
    start: Instant,
}

impl Profile {
    /// Takes one of `steps`, from 0 at the start of this process, for the file `path`.
    pub fn new(steps: Range<u64>, path: PathBuf) -> Self {
        trace::record(Level::Rare);
        Self { steps, path, start: Instant::now() }
    }

    /// Hears that this step comes next.
    pub fn before(&mut self, step: u64) {
        trace::record(if self.steps.contains(&step) { Level::All } else { Level::Rare });
    }

    /// Ends it and writes the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(self) -> Result<()> {
        let trace = trace::take();
        if trace.dropped > 0 {
            warn(format_args!(
                "warning: {} has no room for {} spans of {}: profile fewer steps",
                self.path.display(),
                trace.dropped,
                trace.dropped + trace.spans.len()
            ));
        }
        store::write_bytes(&self.path, &serde_json::to_vec(&events(&trace, self.start))?)
    }
}

/// The process is rank 0; its threads have the names that they have in a debugger.
fn events(trace: &Trace, start: Instant) -> Value {
    let mut events = vec![json!({ "name": "process_name", "ph": "M", "pid": 0, "args": { "name": "kiln, rank 0" } })];
    for (tid, name) in trace.threads.iter().enumerate() {
        events.push(json!({ "name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": { "name": name } }));
    }
    let mut spans: Vec<&Span> = trace.spans.iter().collect();
    // What encloses others begins with them or before, and ends last.
    spans.sort_by_key(|span| (span.start, std::cmp::Reverse(span.end)));
    events.extend(spans.into_iter().map(|span| event(span, start)));
    json!({ "traceEvents": events, "displayTimeUnit": "ms" })
}

fn event(span: &Span, start: Instant) -> Value {
    let microseconds = |from: Instant, to: Instant| to.saturating_duration_since(from).as_nanos() as f64 / 1e3;
    let mut event = json!({
        "name": span.name,
        "cat": span.kind,
        "ph": "X",
        "ts": microseconds(start, span.start),
        "dur": microseconds(span.start, span.end),
        "pid": 0,
        "tid": span.thread,
    });
    if let Some(detail) = &span.detail {
        event["args"] = json!({ "of": detail });
    }
    event
}
