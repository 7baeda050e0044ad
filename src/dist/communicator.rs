//! The thread that a process group lives on, so that sums go on beside the backward.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{ProcessGroup, Solo};

type Job = Box<dyn FnOnce(&mut dyn ProcessGroup) + Send>;

/// A process group on a thread of its own. What is asked of it is done in order, one after another.
pub struct Communicator {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    place: Place,
    busy: Arc<AtomicU64>,
    waited: Arc<AtomicU64>,
}

#[derive(Clone, Copy)]
struct Place {
    rank: usize,
    local_rank: usize,
    world_size: usize,
}

/// What a [`Communicator`] will have done.
#[must_use = "its error is lost otherwise"]
pub struct Pending<T> {
    result: Receiver<Result<T>>,
    waited: Arc<AtomicU64>,
}

impl<T> Pending<T> {
    /// Waits for it.
    ///
    /// # Errors
    /// Its own, or the end of the communicator's thread.
    pub fn wait(self) -> Result<T> {
        let started = Instant::now();
        let result = self.result.recv();
        count(&self.waited, started);
        result.context("the thread that talks to the other ranks has ended")?
    }
}

impl Communicator {
    /// Makes a group on a new thread, where it stays: NCCL's belong to their thread.
    ///
    /// # Errors
    /// What making it says.
    pub fn new<G: ProcessGroup>(make: impl FnOnce() -> Result<G> + Send + 'static) -> Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let (made, answer) = channel();
        let busy = Arc::new(AtomicU64::new(0));
        let worked = busy.clone();
        let work = move || match make() {
            Ok(mut group) => {
                let (rank, local_rank, world_size) = (group.rank(), group.local_rank(), group.world_size());
                let _ = made.send(Ok(Place { rank, local_rank, world_size }));
                for job in queue {
                    let started = Instant::now();
                    job(&mut group);
                    count(&worked, started);
                }
            }
            Err(error) => {
                let _ = made.send(Err(error));
            }
        };
        let thread =
            thread::Builder::new().name("communicator".into()).spawn(work).context("starting the communicator")?;
        let place = answer.recv().context("the communicator ended at once")??;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), place, busy, waited: Arc::default() })
    }

    /// One process alone.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn solo() -> Result<Self> {
        Self::new(|| Ok(Solo))
    }

    /// This process, from 0.
    pub fn rank(&self) -> usize {
        self.place.rank
    }
    /// This process among those of its machine, from 0.
    pub fn local_rank(&self) -> usize {
        self.place.local_rank
    }
    /// How many processes there are.
    pub fn world_size(&self) -> usize {
        self.place.world_size
    }
    /// Whether this is the process that logs, prints and writes.
    pub fn is_main(&self) -> bool {
        self.place.rank == 0
    }
    /// How long the group has worked or waited for other ranks, in all.
    pub fn busy(&self) -> Duration {
        Duration::from_nanos(self.busy.load(Ordering::Relaxed))
    }
    /// How long others have waited for what the group does, in all: what was not hidden behind their work.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited.load(Ordering::Relaxed))
    }

    /// Has the group do `job` after what was asked of it before.
    pub fn submit<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn ProcessGroup) -> Result<T> + Send + 'static,
    ) -> Pending<T> {
        let (done, result) = channel();
        let job: Job = Box::new(move |group| {
            let _ = done.send(job(group));
        });
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job); // that the thread has ended is what `wait` says
        }
        Pending { result, waited: self.waited.clone() }
    }

    /// What every rank gave, by rank.
    ///
    /// # Errors
    /// A rank that is lost.
    pub fn all_gather<T: Serialize + DeserializeOwned>(&self, value: &T) -> Result<Vec<T>> {
        self.gather(value, false)
    }

    fn gather<T: Serialize + DeserializeOwned>(&self, value: &T, patient: bool) -> Result<Vec<T>> {
        let bytes = serde_json::to_vec(value)?;
        let gather = move |group: &mut dyn ProcessGroup| {
            group.patient(patient);
            let gathered = group.all_gather(&bytes);
            group.patient(false);
            gathered
        };
        let gathered = self.submit(gather).wait()?;
        let read = |(rank, bytes): (usize, &Vec<u8>)| {
            serde_json::from_slice(bytes).with_context(|| format!("what rank {rank} said cannot be read"))
        };
        gathered.iter().enumerate().map(read).collect()
    }

    /// The main process's `value` on every rank, once it has one; what the others give is not read.
    ///
    /// # Errors
    /// A rank that is lost.
    pub fn from_main<T: Serialize + DeserializeOwned>(&self, value: Option<&T>) -> Result<T> {
        let mut values = self.gather(&value.filter(|_| self.is_main()).map(serde_json::to_value).transpose()?, true)?;
        let value = values.swap_remove(0).context("the main process said nothing")?;
        serde_json::from_value(value).context("what the main process said cannot be read")
    }

    /// Returns when every rank has come here.
    ///
    /// # Errors
    /// A rank that is lost.
    pub fn barrier(&self) -> Result<()> {
        self.submit(|group| group.barrier()).wait()
    }

    /// Has what the main process does first be done once: it works, then the first rank of each other
    /// machine, then the rest, who find it done.
    ///
    /// # Errors
    /// What `work` says, or a rank that is lost.
    pub fn in_turn<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let turn = usize::from(!self.is_main()) + usize::from(self.local_rank() > 0);
        let (mut work, mut result) = (Some(work), None);
        for now in 0..3 {
            if now == turn
                && let Some(work) = work.take()
            {
                result = Some(work()?);
            }
            self.gather(&(), true)?;
        }
        result.context("a rank has no turn")
    }

    /// Tells all other ranks that this one gives up.
    pub fn abort(&self, reason: &str) {
        let reason = reason.to_owned();
        let _ = self.submit(move |group| {
            group.abort(&reason);
            Ok(())
        });
    }
}

/// Adds the time since `started`.
fn count(sum: &AtomicU64, started: Instant) {
    sum.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if thread::panicking() {
            self.abort("it panicked");
        }
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
