//! Which part this process has in a training by many: to watch those that it starts, to lead, or to
//! follow.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::cli::Nodes;
use crate::config::{Config, Processes};
use crate::data::{self, Snapshot};
use crate::dist::{self, Communicator, Launch, RESOURCE_CONFIG, Timing, World};
use crate::error::say;
use crate::store::Experiment;
use crate::train::{Job, Outcome, Signal, Signals};
use crate::{dashboard, user_error};

/// What this process is to the others.
pub enum Part {
    /// It starts them and watches.
    Agent(Launch),
    /// One of those that train, or the only one.
    Rank(World),
}

impl Part {
    /// What the environment says, else SageMaker's container, else the command line and the file.
    ///
    /// # Errors
    /// The user's: variables or options that do not fit one another.
    pub fn of_this_process(nodes: &Nodes, config: &Config) -> Result<Self> {
        if let Some(world) = launched()?.filter(|world| world.world_size > 1) {
            fits(nodes, &world)?;
            return Ok(Self::Rank(world));
        }
        let nproc_per_node = match nodes.nproc_per_node.unwrap_or(config.distributed.nproc_per_node) {
            Processes::Count(count) => count,
            Processes::Gpu => match kiln_kernels::cuda_devices() {
                0 if cfg!(feature = "cuda") => {
                    return Err(user_error!(
                        "nproc_per_node = \"gpu\" is a process for each GPU: this machine has none"
                    ));
                }
                0 => {
                    return Err(user_error!(
                        "nproc_per_node = \"gpu\" is a process for each GPU: this build of kiln is without the feature `cuda`"
                    ));
                }
                gpus => gpus,
            },
        };
        let launch = if let Some(launch) = Launch::from_sagemaker(Path::new(RESOURCE_CONFIG), nproc_per_node)? {
            launch
        } else if let Some(master_addr) = &nodes.master_addr {
            let (nnodes, node_rank) = (nodes.nnodes.into(), usize::from(nodes.node_rank));
            if node_rank >= nnodes {
                return Err(user_error!("--node-rank {node_rank} of --nnodes {nnodes}: needs a number below it"));
            }
            let (master_addr, master_port) = (master_addr.clone(), nodes.master_port);
            Launch { nproc_per_node, nnodes, node_rank, master_addr, master_port, variables: Vec::new() }
        } else if nodes.nnodes > 1 {
            return Err(user_error!("--nnodes {}: needs --master-addr, the host of machine 0", nodes.nnodes));
        } else {
            Launch::local(nproc_per_node)
        };
        Ok(if launch.world_size() == 1 { Self::Rank(World::solo()) } else { Self::Agent(launch) })
    }
}

/// What the command line says has to be what a launcher did.
fn fits(nodes: &Nodes, world: &World) -> Result<()> {
    let does_not = |option: &str, got: usize, launched: usize, what: &str| {
        Err(user_error!("--{option} {got}: a launcher has started {launched} {what}; leave the option out"))
    };
    match nodes.nproc_per_node {
        Some(Processes::Count(count)) if count != world.local_world_size => {
            return does_not("nproc-per-node", count, world.local_world_size, "processes on this machine");
        }
        _ => {}
    }
    let machines = world.world_size.div_ceil(world.local_world_size);
    match usize::from(nodes.nnodes) {
        nnodes if nnodes > 1 && nnodes != machines => does_not("nnodes", nnodes, machines, "machines' processes"),
        _ => Ok(()),
    }
}

/// The rank that a launcher made this process, if one did.
///
/// # Errors
/// The user's: variables that do not fit one another.
pub fn launched() -> Result<Option<World>> {
    World::from_launcher(|name| std::env::var(name).ok())
}

/// Starts the ranks, which run the command that this process was given with `more` arguments, and watches
/// them.
///
/// # Errors
/// A process that cannot be started.
pub fn watch(launch: &Launch, signals: &Signals, more: &[&OsStr]) -> Result<ExitCode> {
    let program = std::env::current_exe().context("looking for kiln itself")?;
    let command = || {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).args(more);
        command
    };
    signals.during(|| dist::spawn(launch, command, || signals.received().map(Signal::number)))
}

/// Waits for the other ranks.
///
/// # Errors
/// Those that do not come in time, or are about something else.
pub fn join(world: World, config: &Config) -> Result<Communicator> {
    if world.world_size == 1 {
        return Communicator::solo();
    }
    let exit = |reason: &str| {
        dashboard::restore();
        say(format_args!("error: {reason}"));
        // SAFETY: it ends the process. What libraries do at an exit, CUDA's for one, may wait for what is lost.
        unsafe { libc::_exit(1) }
    };
    let timeout = Duration::from_secs(config.distributed.timeout_s);
    let timing = Timing { exit: Some(exit), ..Timing::new(timeout) };
    let job = format!("kiln {} {}", env!("CARGO_PKG_VERSION"), config.hash_anywhere());
    // NCCL sums what lies on GPUs; without it the first such sum says so.
    #[cfg(feature = "nccl")]
    return Communicator::new(move || dist::Nccl::join(&world, &job, timing));
    #[cfg(not(feature = "nccl"))]
    Communicator::new(move || dist::Tcp::join(&world, &job, timing))
}

/// What the main process has the others do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Task {
    /// Train this model of the configuration on the snapshot, which lies here.
    Train(usize, String, PathBuf),
    /// Nothing more.
    Done,
}

/// Does what the main process says, to the end.
///
/// # Errors
/// What training says, or a rank that is lost.
pub fn follow(ranks: &Communicator, config: &Config, signals: &Signals) -> Result<ExitCode> {
    while let Task::Train(model, hash, dir) = ranks.from_main(None)? {
        let model = config.models.get(model).context("the main process has other models")?;
        let snapshot = ranks.in_turn(|| snapshot(config, &hash, &dir))?;
        let job = Job { config, model, snapshot: &snapshot, files: None, quiet: true, profile: None, tui: false };
        if let Outcome::Interrupted(signal, _) = job.train(ranks, signals, |_| Ok(()))? {
            return Ok(ExitCode::from(signal.exit_code()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The main process's snapshot, or, on a machine that does not see its files, the same made here.
fn snapshot(config: &Config, hash: &str, dir: &Path) -> Result<Snapshot> {
    if dir.exists() {
        return Snapshot::open(dir);
    }
    let experiment = Experiment::new(&config.root, &config.name);
    let snapshot = data::prepare(&config.data, &experiment.data_dir())?;
    if snapshot.hash() != hash {
        return Err(user_error!(
            "the data here makes snapshot {}, rank 0's is {hash} in {}: give all machines the same files",
            snapshot.hash(),
            dir.display()
        ));
    }
    Ok(snapshot)
}
