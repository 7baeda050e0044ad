//! Servers follow `metrics.jsonl` on a thread of their own: what is not delivered yet lies in the file,
//! so a server that is slow or gone costs a training neither time nor memory.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::event::Event;
use super::mlflow::Mlflow;
use crate::error::say;

/// How often the files are looked into.
const INTERVAL: Duration = Duration::from_secs(1);
/// A server that failed is tried again after this, then after twice as long, up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How long a run's end waits for a server that has never answered, of what it waits for any.
const PATIENCE: Duration = Duration::from_secs(3);
/// Bytes of a file that are told at once at most; more than any line.
const CHUNK: u64 = 4 << 20;

/// The thread, and the way to it.
pub(super) struct Delivery {
    messages: Sender<Message>,
    undelivered: Receiver<Vec<String>>,
    server: String,
}

enum Message {
    Follow(Box<Route>),
    Finish(Duration),
}

/// One model's file and a server that is told what stands in it.
pub(super) struct Route {
    /// How messages name the model: `experiment/run_num/model`.
    model: String,
    log: PathBuf,
    server: Mlflow,
    /// Bytes delivered.
    offset: u64,
    /// Why the last try failed.
    error: Option<String>,
    warned: bool,
    reached: bool,
    wait: Duration,
    next: Instant,
}

impl Route {
    /// From the file's beginning: a server knows what it has.
    pub fn new(model: String, log: PathBuf, server: Mlflow) -> Self {
        let (error, next) = (None, Instant::now());
        Self { model, log, server, offset: 0, error, warned: false, reached: false, wait: FIRST_WAIT, next }
    }
}

impl Delivery {
    /// Starts the thread that tells `server`, as messages name it.
    pub fn start(server: String) -> Result<Self> {
        let (messages, inbox) = mpsc::channel();
        let (outbox, undelivered) = mpsc::channel();
        std::thread::Builder::new()
            .name("trackers".into())
            .spawn(move || run(&inbox, &outbox))
            .context("cannot start a thread for the trackers")?;
        Ok(Self { messages, undelivered, server })
    }

    /// Has a model's file followed.
    pub fn follow(&self, route: Route) {
        // It fails where the thread is gone, and `finish` says so.
        let _ = self.messages.send(Message::Follow(Box::new(route)));
    }

    /// Delivers what is left, for so long at most, and says what is not delivered then, and why.
    pub fn finish(self, limit: Duration) -> Vec<String> {
        let sent = self.messages.send(Message::Finish(limit));
        match sent.map(|()| self.undelivered.recv_timeout(limit + INTERVAL)) {
            Ok(Ok(undelivered)) => undelivered,
            // The thread waits for an answer, or has panicked and said so.
            Ok(Err(_)) | Err(_) => vec![format!(
                "{} has not answered for {} s, and has not all of this run; metrics.jsonl has it",
                self.server,
                limit.as_secs()
            )],
        }
    }
}

fn run(inbox: &Receiver<Message>, outbox: &Sender<Vec<String>>) {
    let (mut routes, mut deadline) = (Vec::new(), None);
    loop {
        let wait = if deadline.is_some() { INTERVAL / 10 } else { INTERVAL };
        match inbox.recv_timeout(wait) {
            Ok(Message::Follow(route)) => routes.push(*route),
            Ok(Message::Finish(limit)) => {
                deadline = Some((Instant::now() + limit.min(PATIENCE), Instant::now() + limit));
                routes.iter_mut().for_each(|route| (route.next, route.wait) = (Instant::now(), FIRST_WAIT));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) if deadline.is_none() => return, // the training failed before its end
            Err(RecvTimeoutError::Disconnected) => {}
        }
        routes.iter_mut().for_each(Route::deliver);
        let Some((unreached, reached)) = deadline else { continue };
        let hopeless = |route: &Route| Instant::now() >= if route.reached { reached } else { unreached };
        if routes.iter().all(|route| route.error.is_none() || hopeless(route)) {
            let _ = outbox.send(routes.iter().filter_map(Route::undelivered).collect());
            return;
        }
    }
}

impl Route {
    /// Tells the server what is new in the file, if it is time to.
    fn deliver(&mut self) {
        if Instant::now() < self.next {
            return;
        }
        match self.try_deliver() {
            Ok(()) => {
                if self.error.take().is_some() {
                    say(format_args!("{} has {} again", self.server.name(), self.model));
                }
                (self.reached, self.wait) = (true, FIRST_WAIT);
            }
            Err(error) => {
                if !self.warned {
                    say(format_args!(
                        "warning: {} does not take {}: {error:#}; training goes on, and it is tried again",
                        self.server.name(),
                        self.model
                    ));
                    self.warned = true;
                }
                self.error = Some(format!("{error:#}"));
                self.next = Instant::now() + self.wait;
                self.wait = (2 * self.wait).min(LONGEST_WAIT);
            }
        }
    }

    fn try_deliver(&mut self) -> Result<()> {
        loop {
            let bytes = self.read().with_context(|| format!("cannot read {}", self.log.display()))?;
            let Some(end) = bytes.iter().rposition(|&byte| byte == b'\n') else { return Ok(()) };
            let lines = bytes[..end].split(|&byte| byte == b'\n');
            let events = lines.map(serde_json::from_slice).collect::<Result<Vec<Event>, _>>();
            let events = events.with_context(|| format!("{} holds a line that is no event", self.log.display()))?;
            self.server.deliver(&events)?;
            self.offset += end as u64 + 1;
        }
    }

    fn read(&self) -> std::io::Result<Vec<u8>> {
        let mut file = File::open(&self.log)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.take(CHUNK).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn undelivered(&self) -> Option<String> {
        let error = self.error.as_ref()?;
        Some(format!("{} has not all of {}: {error}; {} has it", self.server.name(), self.model, self.log.display()))
    }
}
