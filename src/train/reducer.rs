//! Gradients summed over the ranks, bucket by bucket, while backward goes on.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kiln_kernels::{Buffer, Device, Lent};
use kiln_models::nn::trace;
use kiln_models::nn::{Parameter, Parameters};

use crate::data::sampler::CHUNKS;
use crate::dist::{Communicator, Numbers, Order, Pending, ProcessGroup};

/// Cuts the gradients into buckets and has them summed over the ranks.
///
/// Backward completes gradients from the last parameter to the first, so buckets go in that order. As
/// NCCL and the ring want the same order on every rank, a bucket waits for those before it.
pub struct Reducer<'a> {
    ranks: &'a Communicator,
    parameters: &'a Parameters,
    buckets: Vec<Bucket>,
    /// Each trainable parameter's bucket, by its place in the buffers.
    places: BTreeMap<usize, usize>,
}

struct Bucket {
    range: Range<usize>,
    /// Trainable parameters in it.
    parameters: usize,
}

/// One step's sums on their way.
pub struct Sums<'a> {
    reducer: &'a Reducer<'a>,
    /// Parameters of each bucket whose gradients are not complete.
    open: Vec<usize>,
    /// When each bucket was complete, as far as they are.
    complete: Vec<Instant>,
    pending: Vec<Pending<Lent>>,
}

impl<'a> Reducer<'a> {
    /// Buckets of at most `bucket_bytes`, or of one parameter.
    pub fn new(ranks: &'a Communicator, parameters: &'a Parameters, bucket_bytes: usize) -> Self {
        let mut buckets: Vec<Bucket> = Vec::new();
        let mut places = BTreeMap::new();
        let trainable: Vec<&Parameter> = parameters.iter().filter(|p| p.is_trainable()).collect();
        for parameter in trainable.into_iter().rev() {
            let range = parameter.range();
            match buckets.last_mut() {
                Some(last) if (last.range.end - range.start) * size_of::<f32>() <= bucket_bytes => {
                    last.range.start = range.start; // frozen ones between two go along, as zeros
                    last.parameters += 1;
                }
                _ => buckets.push(Bucket { range: range.clone(), parameters: 1 }),
            }
            places.insert(range.start, buckets.len() - 1);
        }
        Self { ranks, parameters, buckets, places }
    }

    /// The bytes of each bucket, in the order in which they are summed.
    pub fn bucket_bytes(&self) -> impl Iterator<Item = usize> {
        self.buckets.iter().map(|bucket| size_of::<f32>() * bucket.range.len())
    }

    /// Begins a step's sums.
    pub fn begin(&'a self) -> Sums<'a> {
        let open = self.buckets.iter().map(|bucket| bucket.parameters).collect();
        Sums { reducer: self, open, complete: Vec::new(), pending: Vec::new() }
    }

    /// Sums gradients that lie whole, in [`Order::Tree`].
    ///
    /// # Errors
    /// A rank that is lost.
    pub fn sum_in_a_tree(&self) -> Result<()> {
        let mut sums = self.begin();
        while self.ranks.world_size() > 1 && sums.pending.len() < self.buckets.len() {
            sums.start(Order::Tree)?;
        }
        sums.wait()
    }
}

impl Sums<'_> {
    /// Notes that a parameter's gradient is complete, and starts what can be started.
    ///
    /// # Errors
    /// Gradients that are lent already.
    pub fn complete(&mut self, parameter: &Parameter) -> kiln_models::Result<()> {
        let Some(&bucket) = self.reducer.places.get(&parameter.range().start) else { return Ok(()) };
        self.open[bucket] = self.open[bucket].saturating_sub(1);
        while self.open.get(self.complete.len()) == Some(&0) {
            self.complete.push(Instant::now());
            if self.reducer.ranks.world_size() > 1 {
                self.start(Order::Fastest)?;
            }
        }
        Ok(())
    }

    /// Starts those that nothing completed (no example of this rank's uses them), and waits for all.
    /// Returns when each was complete.
    ///
    /// # Errors
    /// A rank that is lost.
    pub fn finish(mut self) -> Result<Vec<Instant>> {
        while self.reducer.ranks.world_size() > 1 && self.pending.len() < self.reducer.buckets.len() {
            self.start(Order::Fastest)?;
        }
        let complete = std::mem::take(&mut self.complete);
        self.wait()?;
        Ok(complete)
    }

    fn start(&mut self, order: Order) -> kiln_models::Result<()> {
        let range = self.reducer.buckets[self.pending.len()].range.clone();
        let mut lent = self.reducer.parameters.gradients_mut().lend(range)?;
        let sum = move |group: &mut dyn ProcessGroup| {
            let _span = trace::span("all_reduce", "communication");
            group.all_reduce(Numbers::from(&mut lent), order)?;
            Ok(lent)
        };
        self.pending.push(self.reducer.ranks.submit(sum));
        Ok(())
    }

    fn wait(self) -> Result<()> {
        let _span = trace::span("wait for all_reduce", "wait");
        // Each gives its bucket back as it is dropped.
        self.pending.into_iter().try_for_each(|pending| pending.wait().map(drop))
    }
}

/// Gradients of [`CHUNKS`] added up in a binary tree, whatever part of them this process makes.
///
/// Every chunk is made alone, in the model's own buffer. Then what stands there is added to the sum before
/// it wherever both are of equally many chunks, as in a binary counter.
#[derive(Default)]
pub struct Tree {
    sums: Vec<Buffer>,
    spare: Vec<Buffer>,
    chunks: usize,
}

impl Tree {
    /// Refuses a world that does not divide [`CHUNKS`], and one of several GPUs.
    ///
    /// # Errors
    /// The user's, with the worlds that there may be.
    pub fn fits(world_size: usize, device: &Device) -> Result<()> {
        if world_size > 1 && !device.is_cpu() {
            return Err(crate::user_error!(
                "train.deterministic = true takes one GPU: NCCL adds in an order of its own"
            ));
        }
        if CHUNKS.is_multiple_of(world_size) {
            return Ok(());
        }
        let sizes: Vec<_> = (1..=CHUNKS).filter(|n| CHUNKS.is_multiple_of(*n)).map(|n| n.to_string()).collect();
        Err(crate::user_error!(
            "train.deterministic = true takes a world size of {}; this one is of {world_size}",
            sizes.join(", ")
        ))
    }

    /// Takes in the chunk in the gradients' buffer, which is left for the next, at zero; after the last of
    /// `chunks`, a power of two, with the sum of all.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn push(&mut self, parameters: &Parameters, chunks: usize) -> Result<()> {
        let mut gradients = parameters.gradients_mut();
        self.chunks += 1;
        for _ in 0..self.chunks.trailing_zeros() {
            let mut before = self.sums.pop().context("a tree of gradients is out of step")?;
            before.add(&gradients)?;
            std::mem::swap(&mut before, &mut *gradients);
            self.spare.push(before);
        }
        if self.chunks < chunks {
            let mut zeros = match self.spare.pop() {
                Some(spare) => spare,
                None => Buffer::zeros(gradients.len(), gradients.device())?,
            };
            zeros.fill(0.0)?;
            std::mem::swap(&mut zeros, &mut *gradients);
            self.sums.push(zeros);
        } else {
            ensure!(self.sums.is_empty(), "{chunks} chunks are no binary tree");
            self.chunks = 0;
        }
        Ok(())
    }
}
