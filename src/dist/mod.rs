//! Many processes that train one model: who they are, how they find one another, and the sums that
//! they share.
//!
//! | file | what |
//! |---|---|
//! | `world` | which rank this process is, by torchrun's, Slurm's or SageMaker's contract |
//! | `spawn` | the ranks of this machine as child processes |
//! | `rendezvous` | rank 0 collects the others and tells each of all |
//! | `pulse` | heartbeats: a rank that dies, stops or stands still is named by all others |
//! | `mesh` | a connection between every two ranks, all of them driven at once |
//! | `solo`, `tcp`, `nccl` | [`ProcessGroup`]s |
//! | `communicator` | the thread that a process group lives on, beside the backward |
//! | `simulate` | what a step would take on many GPUs |
//!
//! Rank 0 is the main process: it alone logs, prints and writes.

mod communicator;
mod mesh;
#[cfg(feature = "nccl")]
mod nccl;
mod pulse;
mod rendezvous;
mod simulate;
mod solo;
mod spawn;
mod tcp;
#[cfg(test)]
mod tests;
mod world;

use anyhow::Result;
use half::bf16;
use kiln_kernels::Lent;

pub use communicator::{Communicator, Pending};
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use pulse::Timing;
pub use simulate::{Links, Prediction, simulate};
pub use solo::Solo;
pub use spawn::spawn;
pub use tcp::Tcp;
pub use world::{Launch, RESOURCE_CONFIG, World};

/// Numbers to be summed over all ranks, in place.
pub enum Numbers<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// bfloat16: each addition is rounded.
    Bf16(&'a mut [bf16]),
    /// Single precision, on a GPU.
    #[cfg(feature = "cuda")]
    Cuda(&'a mut kiln_kernels::OnGpu),
}

impl<'a> From<&'a mut Lent> for Numbers<'a> {
    fn from(lent: &'a mut Lent) -> Self {
        match lent {
            Lent::Host(numbers) => Self::F32(numbers),
            #[cfg(feature = "cuda")]
            Lent::Cuda(numbers) => Self::Cuda(numbers),
        }
    }
}

/// In which order the ranks' numbers are added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The one that costs least; it depends on the world size.
    #[default]
    Fastest,
    /// A binary tree over the ranks: where each of W ranks brings the sum of its half of a larger tree's
    /// leaves, the result has the bits of that tree for every W, a power of two.
    Tree,
}

/// Ranks that compute together. Every rank calls the same collectives in the same order; the result
/// is the same on every rank, to the bit.
///
/// Once a collective has failed the group is of no more use.
pub trait ProcessGroup {
    /// This process, from 0.
    fn rank(&self) -> usize;
    /// This process among those of its machine, from 0.
    fn local_rank(&self) -> usize;
    /// How many processes there are.
    fn world_size(&self) -> usize;

    /// Replaces `numbers`, of one length on all ranks, by their sum over the ranks.
    ///
    /// # Errors
    /// A rank that is lost, named.
    fn all_reduce(&mut self, numbers: Numbers<'_>, order: Order) -> Result<()>;

    /// Replaces `numbers`, of one length on all ranks, by those of rank `root`.
    ///
    /// # Errors
    /// A rank that is lost, named.
    fn broadcast(&mut self, numbers: Numbers<'_>, root: usize) -> Result<()>;

    /// What every rank gave, by rank; lengths may differ.
    ///
    /// # Errors
    /// A rank that is lost, named.
    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Returns when every rank has come here.
    ///
    /// # Errors
    /// A rank that is lost, named.
    fn barrier(&mut self) -> Result<()> {
        self.all_gather(&[]).map(|_| ())
    }

    /// From now on this rank may wait in a collective for as long as the others live: the main process works
    /// alone. Or no longer.
    fn patient(&mut self, patient: bool);

    /// Tells all other ranks that this one gives up, and why: their collectives fail with it.
    fn abort(&mut self, reason: &str);
}
