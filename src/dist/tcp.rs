//! Sums over hosts' memory by plain TCP: for development, tests and clusters of CPUs.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};
use half::bf16;

use super::mesh::{Incoming, Mesh, Outgoing, Sink};
use super::pulse::{Pulse, Timing};
use super::{Numbers, Order, ProcessGroup, World, rendezvous};

/// Begins what a rank gives to be gathered: what begins otherwise is of another collective.
const MARK: [u8; 8] = *b"gathered";
/// The most bytes that a rank gives to be gathered.
const LONGEST: u64 = 1 << 32;

/// Ranks connected by TCP.
///
/// A sum is a reduce-scatter and an all-gather around the ring (Patarasuk and Yuan, 2009): each rank
/// sends and receives 2·(W − 1)/W of the numbers, which is the least there can be.
pub struct Tcp {
    pub(super) world: World,
    mesh: Mesh,
    pub(super) pulse: Arc<Pulse>,
}

impl Tcp {
    /// Waits until all ranks of `world` are there. They have to name the same `job`: what they are to
    /// compute together.
    ///
    /// # Errors
    /// Ranks that do not come within `timing.progress`, or do not belong together.
    pub fn join(world: &World, job: &str, timing: Timing) -> Result<Self> {
        let (mesh, pulse) = rendezvous::join(world, job, timing)?;
        Ok(Self { world: world.clone(), mesh, pulse })
    }

    fn sum<T: Element>(&mut self, numbers: &mut [T], order: Order) -> Result<()> {
        match order {
            Order::Fastest => self.reduce_scatter(numbers)?,
            Order::Tree => self.reduce_scatter_in_a_tree(numbers)?,
        }
        self.share(numbers)
    }

    /// Afterwards this rank's part of `numbers` is summed: part `p` sets out from rank `p + 1` and goes
    /// around, so that its last stop is rank `p`.
    fn reduce_scatter<T: Element>(&mut self, numbers: &mut [T]) -> Result<()> {
        for step in 1..self.world.world_size {
            let [out, into] = self.ring(numbers, step)?;
            let bytes = size_of_val(into);
            let mut rest = into;
            let mut fold = |piece: &[u8]| {
                let (now, later) = std::mem::take(&mut rest).split_at_mut(piece.len() / size_of::<T>());
                T::add(now, piece);
                rest = later;
            };
            let sink = Sink::Fold(bytes, &mut fold);
            let (next, previous) = self.neighbours();
            let receive = Incoming { from: previous, into: sink };
            self.mesh.exchange(&[Outgoing { to: next, bytes: as_bytes(out) }], &mut [receive])?;
        }
        Ok(())
    }

    /// As [`reduce_scatter`](Self::reduce_scatter), in [`Order::Tree`]: each rank hears its part from all.
    fn reduce_scatter_in_a_tree<T: Element>(&mut self, numbers: &mut [T]) -> Result<()> {
        let (world_size, rank, len) = (self.world.world_size, self.world.rank, numbers.len());
        let mine = part(len, rank, world_size);
        let mut parts = vec![vec![T::default(); mine.len()]; world_size];
        parts[rank].copy_from_slice(&numbers[mine.clone()]);
        let others = || (0..world_size).filter(|&other| other != rank);
        let sends: Vec<_> =
            others().map(|to| Outgoing { to, bytes: as_bytes(&numbers[part(len, to, world_size)]) }).collect();
        let received = parts.iter_mut().enumerate().filter(|(from, _)| *from != rank);
        let mut receives: Vec<_> =
            received.map(|(from, part)| Incoming { from, into: Sink::Place(as_bytes_mut(part)) }).collect();
        self.mesh.exchange(&sends, &mut receives)?;
        let mut apart = 1;
        while apart < world_size {
            for pair in parts.chunks_mut(2 * apart).filter(|pair| pair.len() > apart) {
                let (left, right) = pair.split_at_mut(apart);
                T::add(&mut left[0], as_bytes(&right[0]));
            }
            apart *= 2;
        }
        numbers[mine].copy_from_slice(&parts[0]);
        Ok(())
    }

    /// Gives every rank its part of `root`'s numbers, which then are shared (van de Geijn, 1994).
    fn spread<T: Element>(&mut self, numbers: &mut [T], root: usize) -> Result<()> {
        let (rank, world_size, len) = (self.world.rank, self.world.world_size, numbers.len());
        if rank == root {
            let others = (0..world_size).filter(|&other| other != root);
            let sends: Vec<_> =
                others.map(|to| Outgoing { to, bytes: as_bytes(&numbers[part(len, to, world_size)]) }).collect();
            self.mesh.exchange(&sends, &mut [])?;
        } else {
            let into = Sink::Place(as_bytes_mut(&mut numbers[part(len, rank, world_size)]));
            self.mesh.exchange(&[], &mut [Incoming { from: root, into }])?;
        }
        self.share(numbers)
    }

    /// Gives every rank every part, of which each has its own.
    fn share<T: Element>(&mut self, numbers: &mut [T]) -> Result<()> {
        let (next, previous) = self.neighbours();
        for step in 0..self.world.world_size - 1 {
            let [out, into] = self.ring(numbers, step)?;
            let receive = Incoming { from: previous, into: Sink::Place(as_bytes_mut(into)) };
            self.mesh.exchange(&[Outgoing { to: next, bytes: as_bytes(out) }], &mut [receive])?;
        }
        Ok(())
    }

    /// Whom this rank sends to, and whom it hears.
    fn neighbours(&self) -> (usize, usize) {
        let (rank, world_size) = (self.world.rank, self.world.world_size);
        ((rank + 1) % world_size, (rank + world_size - 1) % world_size)
    }

    /// The parts of `numbers` that this rank sends and hears at a step around the ring.
    fn ring<'a, T>(&self, numbers: &'a mut [T], step: usize) -> Result<[&'a mut [T]; 2]> {
        let (rank, world_size, len) = (self.world.rank, self.world.world_size, numbers.len());
        let part = |back: usize| part(len, (rank + 2 * world_size - back) % world_size, world_size);
        Ok(numbers.get_disjoint_mut([part(step), part(step + 1)])?)
    }
}

impl ProcessGroup for Tcp {
    fn rank(&self) -> usize {
        self.world.rank
    }
    fn local_rank(&self) -> usize {
        self.world.local_rank
    }
    fn world_size(&self) -> usize {
        self.world.world_size
    }

    fn all_reduce(&mut self, numbers: Numbers<'_>, order: Order) -> Result<()> {
        self.pulse.clone().during(|| match numbers {
            Numbers::F32(numbers) => self.sum(numbers, order),
            Numbers::Bf16(numbers) => self.sum(numbers, order),
            #[cfg(feature = "cuda")]
            Numbers::Cuda(_) => Err(on_a_gpu()),
        })
    }

    fn broadcast(&mut self, numbers: Numbers<'_>, root: usize) -> Result<()> {
        let world_size = self.world.world_size;
        ensure!(root < world_size, "a broadcast from rank {root} of {world_size}");
        self.pulse.clone().during(|| match numbers {
            Numbers::F32(numbers) => self.spread(numbers, root),
            Numbers::Bf16(numbers) => self.spread(numbers, root),
            #[cfg(feature = "cuda")]
            Numbers::Cuda(_) => Err(on_a_gpu()),
        })
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (rank, world_size) = (self.world.rank, self.world.world_size);
        let mut gather = |bytes: &[u8], gathered: &mut [Vec<u8>]| {
            gathered[rank].copy_from_slice(bytes);
            let others = (0..world_size).filter(|&other| other != rank);
            let sends: Vec<_> = others.map(|to| Outgoing { to, bytes }).collect();
            let received = gathered.iter_mut().enumerate().filter(|(from, _)| *from != rank);
            let mut receives: Vec<_> =
                received.map(|(from, bytes)| Incoming { from, into: Sink::Place(bytes) }).collect();
            self.mesh.exchange(&sends, &mut receives)
        };
        self.pulse.clone().during(|| {
            let mut headers = vec![vec![0; 16]; world_size];
            gather(&[MARK, (bytes.len() as u64).to_le_bytes()].concat(), &mut headers)?;
            let mut gathered = Vec::new();
            for (from, header) in headers.iter().enumerate() {
                let (mark, length) = header.split_at(8);
                let length = length.iter().rev().fold(0u64, |length, &byte| length << 8 | u64::from(byte));
                ensure!(mark == MARK && length <= LONGEST, "rank {from} is out of step: it does something else");
                gathered.push(vec![0; length as usize]);
            }
            gather(bytes, &mut gathered)?;
            Ok(gathered)
        })
    }

    fn patient(&mut self, patient: bool) {
        self.pulse.patient(patient);
    }

    fn abort(&mut self, reason: &str) {
        self.pulse.abort(reason);
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.pulse.abort("it panicked");
        }
        self.pulse.leave();
    }
}

#[cfg(feature = "cuda")]
fn on_a_gpu() -> anyhow::Error {
    crate::user_error!("ranks on GPUs need NCCL: this build of kiln is without the feature `nccl`")
}

/// Part `i` of `len` numbers cut into `parts`.
fn part(len: usize, i: usize, parts: usize) -> Range<usize> {
    len * i / parts..len * (i + 1) / parts
}

/// What is summed and sent, as it lies in memory.
///
/// # Safety
/// Every pattern of bits is a value, and there is no padding.
unsafe trait Element: Copy + Default {
    /// Adds as many elements as `into` has.
    fn add(into: &mut [Self], from: &[u8]);
}

const _: () = assert!(cfg!(target_endian = "little"), "numbers travel as little-endian hosts have them");

// SAFETY: plain numbers.
unsafe impl Element for f32 {
    fn add(into: &mut [Self], from: &[u8]) {
        let (from, _) = from.as_chunks();
        for (into, from) in into.iter_mut().zip(from) {
            *into += f32::from_le_bytes(*from);
        }
    }
}

// SAFETY: plain numbers.
unsafe impl Element for bf16 {
    fn add(into: &mut [Self], from: &[u8]) {
        let (from, _) = from.as_chunks();
        for (into, from) in into.iter_mut().zip(from) {
            *into = bf16::from_f32(into.to_f32() + bf16::from_le_bytes(*from).to_f32());
        }
    }
}

fn as_bytes<T: Element>(numbers: &[T]) -> &[u8] {
    // SAFETY: an element has no padding, and the slice is as long as is said.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

fn as_bytes_mut<T: Element>(numbers: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes written are elements.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}
