//! Spans: what is done, and from when to when, kept in memory for as long as somebody wants them.
//!
//! Nothing is kept until [`record`] says so: until then a span costs one load of a static and no memory.
//! On a GPU a span of an op is the time that its launch took, as the GPU works behind.

use std::cell::OnceCell;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Spans that are kept at most; those after them are counted.
const MOST: usize = 1 << 18;

static LEVEL: AtomicU8 = AtomicU8::new(Level::Nothing as u8);
static TRACE: Mutex<Trace> = Mutex::new(Trace { spans: Vec::new(), threads: Vec::new(), dropped: 0 });

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Nothing.
    Nothing,
    /// What is rare: [`rare`].
    Rare,
    /// Every span.
    All,
}

/// Something that was done.
#[derive(Clone, Debug)]
pub struct Span {
    /// What.
    pub name: &'static str,
    /// Of which kind, as `forward`.
    pub kind: &'static str,
    /// On what, as the first of an op's parameters.
    pub detail: Option<String>,
    /// The thread, by its place in [`Trace::threads`].
    pub thread: u32,
    /// From when.
    pub start: Instant,
    /// To when.
    pub end: Instant,
}

/// What was kept.
#[derive(Debug, Default)]
pub struct Trace {
    /// In the order in which they ended.
    pub spans: Vec<Span>,
    /// The threads' names, in the order in which they first began one.
    pub threads: Vec<String>,
    /// Spans for which there was no room.
    pub dropped: usize,
}

/// Keeps spans that begin from now on, or no more.
pub fn record(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Ends the recording and gives what was kept.
pub fn take() -> Trace {
    record(Level::Nothing);
    let mut trace = TRACE.lock().unwrap_or_else(PoisonError::into_inner);
    let (spans, dropped) = (std::mem::take(&mut trace.spans), std::mem::take(&mut trace.dropped));
    Trace { spans, threads: trace.threads.clone(), dropped } // threads keep their places
}

/// Begins a span, which ends where what this returns is dropped.
#[inline]
#[must_use = "the span ends at once otherwise"]
pub fn span(name: &'static str, kind: &'static str) -> Option<Running> {
    on(Level::All).then(|| Running::new(name, kind, None))
}

/// As [`span`], with what it is done on, which is asked for where it is kept alone.
#[inline]
#[must_use = "the span ends at once otherwise"]
pub fn span_of(name: &'static str, kind: &'static str, detail: impl FnOnce() -> Option<String>) -> Option<Running> {
    on(Level::All).then(|| Running::new(name, kind, detail()))
}

/// As [`span`], of what happens now and then in a training and not in every step.
#[inline]
#[must_use = "the span ends at once otherwise"]
pub fn rare(name: &'static str, kind: &'static str) -> Option<Running> {
    on(Level::Rare).then(|| Running::new(name, kind, None))
}

#[inline]
fn on(level: Level) -> bool {
    LEVEL.load(Ordering::Relaxed) >= level as u8
}

/// A span that has begun.
pub struct Running {
    name: &'static str,
    kind: &'static str,
    detail: Option<String>,
    thread: u32,
    start: Instant,
}

impl Running {
    #[cold]
    fn new(name: &'static str, kind: &'static str, detail: Option<String>) -> Self {
        Self { name, kind, detail, thread: thread(), start: Instant::now() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (end, detail) = (Instant::now(), self.detail.take());
        let Self { name, kind, thread, start, .. } = *self;
        let mut trace = TRACE.lock().unwrap_or_else(PoisonError::into_inner);
        if trace.spans.len() < MOST {
            trace.spans.push(Span { name, kind, detail, thread, start, end });
        } else {
            trace.dropped += 1;
        }
    }
}

/// This thread's place among those that have begun a span.
fn thread() -> u32 {
    thread_local! { static THREAD: OnceCell<u32> = const { OnceCell::new() } }
    THREAD.with(|thread| {
        *thread.get_or_init(|| {
            let mut trace = TRACE.lock().unwrap_or_else(PoisonError::into_inner);
            trace.threads.push(std::thread::current().name().unwrap_or("unnamed").to_owned());
            trace.threads.len() as u32 - 1
        })
    })
}

/// The last part of a type's name: `Linear` of `kiln_models::nn::linear::Linear`.
pub(crate) fn type_name<T>() -> &'static str {
    let name = std::any::type_name::<T>();
    name.rsplit_once("::").map_or(name, |(_, last)| last)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, as what is recorded is the process's.
    #[test]
    fn spans_are_kept_while_they_are_wanted() {
        let mine = |trace: &Trace| {
            let mine = trace.spans.iter().filter(|span| span.kind == "test of trace");
            mine.map(|span| (span.name, span.detail.clone())).collect::<Vec<_>>()
        };
        let detail = || -> Option<String> { unreachable!("nobody wants it") };
        assert!(span_of("before", "test of trace", detail).is_none());
        record(Level::Rare);
        assert!(span("op", "test of trace").is_none());
        drop(rare("evaluation", "test of trace"));
        record(Level::All);
        let outer = span("outer", "test of trace");
        drop(span_of("inner", "test of trace", || Some("weight".into())));
        drop(outer);
        let trace = take();
        assert!(rare("after", "test of trace").is_none());
        assert_eq!(mine(&trace), [("evaluation", None), ("inner", Some("weight".into())), ("outer", None)]);
        let own = trace.spans.iter().find(|span| span.name == "outer").unwrap();
        assert_eq!(Some(trace.threads[own.thread as usize].as_str()), std::thread::current().name());
        assert!(own.start <= own.end && trace.dropped == 0);
        assert_eq!(mine(&take()), []);
    }
}
