//! Heartbeats: whether all ranks live, and the one word about it that all of them hear.
//!
//! Every rank holds a connection to rank 0 for as long as the group lasts. A rank that dies closes
//! it; one that is stopped, or cut off, goes silent; one that stands still says so in its own beats.
//! Whoever sees it first says the verdict, rank 0 passes it on, and every collective fails with it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// How long is waited for what.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two heartbeats.
    pub beat: Duration,
    /// Silence after which a rank counts as lost.
    pub lost: Duration,
    /// What a rank is given to end by itself when another is lost, before `exit` ends it.
    pub grace: Duration,
    /// How long a rank may keep the others waiting in a collective, and ranks for one another at the start.
    pub progress: Duration,
    /// Ends the process, having said why. `None`: nothing does.
    pub exit: Option<fn(&str)>,
}

impl Timing {
    /// A lost rank is named after 5 s, and no process outlives it by more than 4 s.
    pub fn new(progress: Duration) -> Self {
        let [beat, lost, grace] = [500, 5000, 3000].map(Duration::from_millis);
        Self { beat, lost, grace, progress, exit: None }
    }
}

/// Another rank, as it introduced itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Member {
    pub rank: usize,
    pub pid: u32,
    pub host: String,
    /// Where it takes connections of other ranks.
    pub address: std::net::SocketAddr,
}

impl std::fmt::Display for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} (process {} on {})", self.rank, self.pid, self.host)
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// I live: collectives entered so far, and how long I have been in the last, in ms.
    Beat(u64, u64),
    /// The group is at its end, and why.
    Lost(String),
    /// I have done my part.
    Bye,
}

/// One rank's sight of the whole group. Lives while any of its threads does.
pub(super) struct Pulse {
    timing: Timing,
    me: Member,
    verdict: Mutex<Option<String>>,
    decided: Condvar,
    /// Collectives entered.
    entered: AtomicU64,
    /// When the present one was, in ms since `start`, plus 1; 0 outside.
    inside_since: AtomicU64,
    /// Whether it may take as long as it takes.
    patient: AtomicBool,
    start: Instant,
    links: Vec<Link>,
    /// Connections that the verdict closes, so that whoever waits on one wakes.
    data: Mutex<Vec<TcpStream>>,
    over: Mutex<bool>,
    ended: Condvar,
}

/// The connection to rank 0, or rank 0's to another.
struct Link {
    peer: Member,
    stream: Mutex<TcpStream>,
    seen: Mutex<Seen>,
}

#[derive(Clone, Copy)]
struct Seen {
    at: Instant,
    entered: u64,
    inside: Duration,
    left: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pulse {
    /// Starts to beat on `links`.
    pub fn start(me: Member, links: Vec<(Member, TcpStream)>, timing: Timing) -> Result<Arc<Self>> {
        let mut readers = Vec::new();
        let links = links.into_iter().map(|(peer, stream)| {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(Some(timing.beat))?; // a stopped peer reads nothing
            readers.push(BufReader::new(stream.try_clone()?));
            let seen = Seen { at: Instant::now(), entered: 0, inside: Duration::ZERO, left: false };
            Ok(Link { peer, stream: Mutex::new(stream), seen: Mutex::new(seen) })
        });
        let pulse = Arc::new(Self {
            timing,
            me,
            verdict: Mutex::default(),
            decided: Condvar::new(),
            entered: AtomicU64::new(0),
            inside_since: AtomicU64::new(0),
            patient: AtomicBool::new(false),
            start: Instant::now(),
            links: links.collect::<std::io::Result<_>>().context("setting up heartbeats")?,
            data: Mutex::default(),
            over: Mutex::new(false),
            ended: Condvar::new(),
        });
        for (i, reader) in readers.into_iter().enumerate() {
            let pulse = pulse.clone();
            spawn("pulse-in", move || pulse.listen(i, reader))?;
        }
        let beating = pulse.clone();
        spawn("pulse", move || beating.beat())?;
        Ok(pulse)
    }

    /// Has the verdict close this connection.
    pub fn guard(&self, stream: &TcpStream) -> Result<()> {
        lock(&self.data).push(stream.try_clone().context("setting up heartbeats")?);
        Ok(())
    }

    /// Runs one collective, whose errors become the verdict's: what a broken connection means is known
    /// only once the heartbeats have been heard.
    pub fn during<T>(&self, collective: impl FnOnce() -> Result<T>) -> Result<T> {
        if let Some(verdict) = self.verdict() {
            anyhow::bail!(verdict);
        }
        self.entered.fetch_add(1, Ordering::Relaxed);
        if !self.patient.load(Ordering::Relaxed) {
            self.inside_since.store(self.start.elapsed().as_millis() as u64 + 1, Ordering::Relaxed);
        }
        let result = collective();
        self.inside_since.store(0, Ordering::Relaxed);
        result.map_err(|error| {
            let verdict = lock(&self.verdict);
            let patience = self.timing.lost + 2 * self.timing.beat;
            let waited = self.decided.wait_timeout_while(verdict, patience, |verdict| verdict.is_none());
            let verdict = waited.unwrap_or_else(PoisonError::into_inner).0.clone();
            match verdict {
                Some(verdict) => anyhow::anyhow!(verdict),
                None => {
                    self.decide(format!("{}: {error:#}", self.me));
                    error
                }
            }
        })
    }

    /// Whether collectives may take as long as they take from now on.
    pub fn patient(&self, patient: bool) {
        self.patient.store(patient, Ordering::Relaxed);
    }

    /// The verdict, once there is one.
    pub fn verdict(&self) -> Option<String> {
        lock(&self.verdict).clone()
    }

    /// Gives up, for all ranks.
    pub fn abort(&self, reason: &str) {
        self.decide(format!("{} gave up: {reason}", self.me));
    }

    /// Leaves: this rank has done its part, and is no longer to be watched.
    pub fn leave(&self) {
        if self.verdict().is_none() {
            self.tell(&Message::Bye);
        }
        *lock(&self.over) = true;
        self.ended.notify_all();
        for link in &self.links {
            let _ = lock(&link.stream).shutdown(Shutdown::Both); // its reader ends
        }
    }

    fn decide(&self, reason: String) {
        {
            let mut verdict = lock(&self.verdict);
            if verdict.is_some() {
                return;
            }
            *verdict = Some(reason.clone());
        }
        self.tell(&Message::Lost(reason));
        self.decided.notify_all();
        for stream in lock(&self.data).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.ended.notify_all(); // the beat begins to count the grace
    }

    fn tell(&self, message: &Message) {
        let Ok(mut line) = serde_json::to_vec(message) else { return };
        line.push(b'\n');
        for link in &self.links {
            let _ = lock(&link.stream).write_all(&line); // a peer that cannot hear it is found by its silence
        }
    }

    fn listen(&self, link: usize, reader: BufReader<TcpStream>) {
        let Link { peer, seen, .. } = &self.links[link];
        for line in reader.lines() {
            let Ok(line) = line else { break };
            match serde_json::from_str(&line) {
                Ok(Message::Beat(entered, inside)) => {
                    let inside = Duration::from_millis(inside);
                    *lock(seen) = Seen { at: Instant::now(), entered, inside, left: false };
                }
                Ok(Message::Lost(reason)) => return self.decide(reason),
                Ok(Message::Bye) => {
                    lock(seen).left = true;
                    return;
                }
                Err(_) => return self.decide(format!("{peer} is lost: it says {line:?}, which is no heartbeat")),
            }
        }
        if !*lock(&self.over) {
            self.decide(format!("{peer} is lost: its connection closed"));
        }
    }

    fn beat(&self) {
        let mut last = Instant::now();
        loop {
            let over = lock(&self.over);
            if *over || self.wait(over, self.timing.beat) {
                return;
            }
            if let Some(verdict) = self.verdict() {
                // What computes, or waits for a disk, is given some time to hear of it.
                let over = lock(&self.over);
                if let (false, Some(exit)) = (*over || self.wait(over, self.timing.grace), self.timing.exit) {
                    exit(&verdict);
                }
                return;
            }
            let inside = self.inside();
            self.tell(&Message::Beat(self.entered.load(Ordering::Relaxed), inside.as_millis() as u64));
            // A process that was stopped itself has heard nobody: it knows nothing of the others.
            let slept = last.elapsed() > self.timing.lost / 2;
            last = Instant::now();
            if slept {
                self.links.iter().for_each(|link| lock(&link.seen).at = last);
                continue;
            }
            self.judge(inside);
        }
    }

    /// Waits for the end of the group, at most so long; whether it came.
    fn wait(&self, over: MutexGuard<'_, bool>, time: Duration) -> bool {
        let verdict_before = self.verdict().is_some();
        let waited =
            self.ended.wait_timeout_while(over, time, |over| !*over && self.verdict().is_some() == verdict_before);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn inside(&self) -> Duration {
        match self.inside_since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => self.start.elapsed().saturating_sub(Duration::from_millis(since - 1)),
        }
    }

    fn judge(&self, inside: Duration) {
        let seen = |link: &Link| *lock(&link.seen);
        if let Some(link) = self.links.iter().find(|link| inside > self.timing.lost && seen(link).left) {
            return self.decide(format!("{} has left, and others wait for it", link.peer));
        }
        for link in self.links.iter().filter(|link| !seen(link).left) {
            let silence = seen(link).at.elapsed();
            if silence > self.timing.lost {
                return self.decide(format!("{} is lost: silent for {:.0} s", link.peer, silence.as_secs_f64()));
            }
        }
        if self.me.rank != 0 {
            return; // rank 0 sees all
        }
        let all = || {
            let others = self.links.iter().map(|link| (&link.peer, seen(link)));
            let others = others.filter(|(_, seen)| !seen.left).map(|(peer, seen)| (peer, seen.entered, seen.inside));
            others.chain(std::iter::once((&self.me, self.entered.load(Ordering::Relaxed), inside)))
        };
        let longest = all().map(|(_, _, inside)| inside).max().unwrap_or_default();
        if longest > self.timing.progress {
            let least = all().map(|(_, entered, _)| entered).min().unwrap_or_default();
            let late: Vec<_> =
                all().filter(|(_, entered, _)| *entered == least).map(|(peer, ..)| peer.to_string()).collect();
            self.decide(format!(
                "{} made no progress while others waited for {:.0} s; train.distributed.timeout_s allows {:.0}",
                late.join(", "),
                longest.as_secs_f64(),
                self.timing.progress.as_secs_f64()
            ));
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name(name.into()).spawn(work).map(|_| ()).context("starting a thread for heartbeats")
}
