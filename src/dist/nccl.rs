//! Sums over GPUs' memory by NCCL.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use cudarc::driver::{CudaSlice, CudaStream};
use cudarc::nccl::safe::{Comm, Id, ReduceOp};
use kiln_kernels::OnGpu;

use super::{Numbers, Order, ProcessGroup, Tcp, Timing, World};

/// Ranks with a GPU each. What lies on a GPU is summed by NCCL, in place and on a stream of its own, which
/// waits for what the backward had launched when it lent the numbers, and for no more. What lies on the
/// hosts goes by [`Tcp`], as do the heartbeats and the id by which NCCL finds the ranks.
pub struct Nccl {
    tcp: Tcp,
    /// Made with the first numbers, which say which GPU.
    communicator: Option<Communicator>,
}

struct Communicator {
    comm: Comm,
    stream: Arc<CudaStream>,
}

impl Nccl {
    /// Waits until all ranks of `world` are there, as [`Tcp::join`] does.
    ///
    /// # Errors
    /// As [`Tcp::join`].
    pub fn join(world: &World, job: &str, timing: Timing) -> Result<Self> {
        Ok(Self { tcp: Tcp::join(world, job, timing)?, communicator: None })
    }

    /// Has NCCL work on `numbers` when they are ready, and waits until it is done: this is the
    /// communicator's thread, and a rank that waits here is seen to wait.
    fn run(&mut self, numbers: &mut OnGpu, work: impl FnOnce(&Comm, &mut CudaSlice<f32>) -> Result<()>) -> Result<()> {
        if numbers.is_empty() {
            return Ok(());
        }
        self.connect(numbers)?;
        let Communicator { comm, stream } = self.communicator.as_ref().context("NCCL has no communicator")?;
        self.tcp.pulse.clone().during(|| {
            stream.wait(numbers.ready()).map_err(|e| anyhow!("CUDA, waiting for gradients: {e}"))?;
            // SAFETY: the loan is of as many numbers, alone, and outlives the work.
            let mut slice = unsafe { stream.upgrade_device_ptr::<f32>(numbers.address(), numbers.len()) };
            let done = work(comm, &mut slice);
            slice.leak(); // not ours to free
            done?;
            stream.synchronize().map_err(|e| anyhow!("CUDA, after NCCL: {e}"))
        })
    }

    fn connect(&mut self, numbers: &OnGpu) -> Result<()> {
        if self.communicator.is_some() {
            return Ok(());
        }
        let (rank, world_size) = (self.tcp.world.rank, self.tcp.world.world_size);
        let id = if rank == 0 { Some(Id::new().map_err(|e| says("an id", &e))?) } else { None };
        let bytes: Vec<u8> = id.iter().flat_map(|id| id.internal().map(|byte| byte as u8)).collect();
        let all = self.tcp.all_gather(&bytes)?;
        let internal: [u8; 128] =
            all[0].as_slice().try_into().map_err(|_| anyhow!("rank 0 gave {} bytes as NCCL's id", all[0].len()))?;
        let id = Id::uninit(internal.map(|byte| byte as core::ffi::c_char));
        let context = numbers.stream().context();
        context.bind_to_thread().map_err(|e| anyhow!("CUDA, on the communicator's thread: {e}"))?;
        let stream = context.new_stream().map_err(|e| anyhow!("CUDA, a stream for NCCL: {e}"))?;
        let comm = self.tcp.pulse.clone().during(|| {
            Comm::from_rank(stream.clone(), rank, world_size, id).map_err(|e| {
                says("bringing the ranks together", &e).context(
                    "each rank needs a GPU of its own, or NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1 to share one",
                )
            })
        })?;
        self.communicator = Some(Communicator { comm, stream });
        Ok(())
    }
}

fn says(what: &str, error: &cudarc::nccl::result::NcclError) -> anyhow::Error {
    anyhow!("NCCL, {what}: {error:?}; NCCL_DEBUG=INFO says more")
}

impl ProcessGroup for Nccl {
    fn rank(&self) -> usize {
        self.tcp.rank()
    }
    fn local_rank(&self) -> usize {
        self.tcp.local_rank()
    }
    fn world_size(&self) -> usize {
        self.tcp.world_size()
    }

    fn all_reduce(&mut self, numbers: Numbers<'_>, order: Order) -> Result<()> {
        let Numbers::Cuda(numbers) = numbers else { return self.tcp.all_reduce(numbers, order) };
        if order == Order::Tree {
            bail!("NCCL adds in an order of its own, not in a tree");
        }
        self.run(numbers, |comm, numbers| {
            comm.all_reduce_in_place(numbers, &ReduceOp::Sum).map(|_| ()).map_err(|e| says("a sum", &e))
        })
    }

    fn broadcast(&mut self, numbers: Numbers<'_>, root: usize) -> Result<()> {
        let Numbers::Cuda(numbers) = numbers else { return self.tcp.broadcast(numbers, root) };
        ensure!(root < self.world_size(), "a broadcast from rank {root} of {}", self.world_size());
        self.run(numbers, |comm, numbers| {
            comm.broadcast_in_place(numbers, root as i32).map(|_| ()).map_err(|e| says("a broadcast", &e))
        })
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.tcp.all_gather(bytes)
    }

    fn patient(&mut self, patient: bool) {
        self.tcp.patient(patient);
    }

    fn abort(&mut self, reason: &str) {
        self.tcp.abort(reason);
    }
}
