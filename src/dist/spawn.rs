//! The ranks of this machine as child processes of one that only watches.

use std::collections::VecDeque;
use std::io::BufReader;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::Launch;
use crate::error::say;

/// Lines that are kept of what a rank says, to be shown if it fails.
const LAST_LINES: usize = 20;
/// Between two looks at the processes.
const LOOK: Duration = Duration::from_millis(20);
/// What the others are given to end by themselves after one has failed.
const PATIENCE: Duration = Duration::from_secs(6);

/// One rank's process.
struct Rank {
    rank: usize,
    child: Child,
    /// Its last lines, once it has ended. The main process has none: it prints for itself.
    lines: Option<JoinHandle<VecDeque<String>>>,
    ended: Option<ExitStatus>,
}

/// What has become of all.
struct Spawned {
    ranks: Vec<Rank>,
    /// Those that failed, as indices, in order, and when the first did.
    failed: Vec<usize>,
    since: Option<Instant>,
    /// Whether the others were told to end, then.
    stopped: bool,
}

/// Starts this machine's ranks, each `command()` with torchrun's variables, and waits for their end.
/// `signal` says which signal has come for them, if any.
///
/// No rank outlives this process: on Linux however it ends, elsewhere unless it is killed.
///
/// # Errors
/// A process that cannot be started: the others are ended.
pub fn spawn(launch: &Launch, command: impl Fn() -> Command, signal: impl Fn() -> Option<i32>) -> Result<ExitCode> {
    let port = match launch.master_port {
        0 => free_port()?,
        port => port,
    };
    let mut spawned = Spawned { ranks: Vec::new(), failed: Vec::new(), since: None, stopped: false };
    for local_rank in 0..launch.nproc_per_node {
        let rank = launch.node_rank * launch.nproc_per_node + local_rank;
        let mut command = command();
        for (name, value) in &launch.variables {
            if std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        for (name, value) in [
            ("RANK", rank),
            ("LOCAL_RANK", local_rank),
            ("WORLD_SIZE", launch.world_size()),
            ("LOCAL_WORLD_SIZE", launch.nproc_per_node),
        ] {
            command.env(name, value.to_string());
        }
        command.env("MASTER_ADDR", &launch.master_addr).env("MASTER_PORT", port.to_string()).stdin(Stdio::null());
        let mut lines = None;
        if rank > 0 {
            let (reader, writer) = std::io::pipe().context("a pipe to hear a rank by")?;
            command.stdout(writer.try_clone()?).stderr(writer);
            lines = Some(thread::spawn(move || last_lines(BufReader::new(reader))));
        }
        bind_to_parent(&mut command);
        let child = command.spawn().with_context(|| format!("cannot start rank {rank}"))?;
        spawned.ranks.push(Rank { rank, child, lines, ended: None });
    }
    let mut told = None;
    while spawned.look()? {
        let now = signal();
        if now != told {
            now.into_iter().for_each(|signal| spawned.tell(signal, 0));
            told = now;
        }
        if let Some(since) = spawned.since {
            if !spawned.stopped {
                spawned.tell(libc::SIGTERM, 1); // rank 0 hears of it from the others, and says it
                spawned.stopped = true;
            }
            if since.elapsed() > PATIENCE {
                spawned.tell(libc::SIGKILL, 0);
            }
        }
        thread::sleep(LOOK);
    }
    Ok(ExitCode::from(spawned.verdict(told)))
}

impl Spawned {
    /// Whether any rank still runs.
    fn look(&mut self) -> Result<bool> {
        for (i, rank) in self.ranks.iter_mut().enumerate().filter(|(_, rank)| rank.ended.is_none()) {
            rank.ended = rank.child.try_wait().with_context(|| format!("watching rank {}", rank.rank))?;
            // What the agent itself ended is not the cause.
            let by_agent =
                |status: ExitStatus| self.stopped && matches!(status.signal(), Some(libc::SIGTERM | libc::SIGKILL));
            if rank.ended.is_some_and(|status| !status.success() && !by_agent(status)) {
                self.failed.push(i);
                self.since = self.since.or(Some(Instant::now()));
            }
        }
        Ok(self.ranks.iter().any(|rank| rank.ended.is_none()))
    }

    /// The exit code for all. Says what a rank said last that failed, unless the main process, which hears
    /// why the others give up, has said it. `told` is the signal that was passed on to them.
    fn verdict(&mut self, told: Option<i32>) -> u8 {
        let Self { ranks, failed, .. } = self;
        let status = |i: usize| ranks[i].ended.unwrap_or_default();
        let main = failed.iter().find(|&&i| ranks[i].rank == 0).and_then(|&i| status(i).code());
        let gave_up =
            |i: usize| status(i).code().is_some_and(|code| matches!(code, 1 | 130 | 143) || Some(code) == main);
        let culprit = failed.iter().copied().find(|&i| !gave_up(i)).or(failed.first().copied());
        let Some(i) = culprit else { return 0 };
        let (code, how, silent) = match (status(i).code(), status(i).signal()) {
            (Some(code), _) => {
                let said = ranks[i].rank == 0 || (gave_up(i) && main.is_some());
                (u8::try_from(code).unwrap_or(1), format!("ended with exit code {code}"), said)
            }
            (None, signal) => {
                let number = signal.unwrap_or_default();
                let asked = signal == told;
                (if asked { 128 + number as u8 } else { 1 }, format!("was ended by signal {number}"), asked)
            }
        };
        let rank = &mut ranks[i];
        if !silent {
            let lines = rank.lines.take().and_then(|lines| lines.join().ok()).unwrap_or_default();
            let quoted: String = lines.iter().map(|line| format!("\n  {line}")).collect();
            let said = if quoted.is_empty() { "" } else { "; it said last:" };
            say(format_args!("rank {} (process {}) {how}{said}{quoted}", rank.rank, rank.child.id()));
        }
        code
    }

    /// Sends a signal to the ranks from `first` on.
    fn tell(&self, signal: i32, first: usize) {
        for rank in self.ranks.iter().filter(|rank| rank.rank >= first && rank.ended.is_none()) {
            // SAFETY: the process is our child and has not been waited for, so the number is its own.
            unsafe { libc::kill(rank.child.id() as i32, signal) };
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        self.tell(libc::SIGKILL, 0);
        for rank in self.ranks.iter_mut().filter(|rank| rank.ended.is_none()) {
            let _ = rank.child.wait();
        }
    }
}

/// Has the child die with this process, and keeps the terminal's signals from it: they are passed on,
/// once.
fn bind_to_parent(command: &mut Command) {
    command.process_group(0);
    #[cfg(target_os = "linux")]
    {
        let parent = std::process::id();
        let bind = move || {
            // SAFETY: two system calls, allowed between fork and exec.
            let alive =
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 && libc::getppid() as u32 == parent };
            if alive { Ok(()) } else { Err(std::io::Error::other("the parent process has ended")) }
        };
        // SAFETY: as above; nothing is allocated on the way that succeeds.
        unsafe { command.pre_exec(bind) };
    }
}

/// What of `reader` is text, by lines; all of it is read.
fn last_lines(reader: impl std::io::BufRead) -> VecDeque<String> {
    let mut last = VecDeque::new();
    for line in reader.split(b'\n').map_while(Result::ok) {
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
    }
    last
}

/// A port that nobody listens at now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("looking for a free port")?;
    Ok(listener.local_addr()?.port())
}
