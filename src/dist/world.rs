//! Which rank this process is: the contracts of torchrun, Slurm and SageMaker, read once at the edge.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::user_error;

/// The port where ranks meet, if nobody says another: torchrun's.
const PORT: u16 = 29500;
/// SageMaker opens this one between the containers of a job.
const SAGEMAKER_PORT: u16 = 7777;
/// Where a SageMaker training container finds its place among the others.
pub const RESOURCE_CONFIG: &str = "/opt/ml/input/config/resourceconfig.json";

/// One process's place among all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// This process, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub world_size: usize,
    /// This process among those of its machine, from 0.
    pub local_rank: usize,
    /// How many of them its machine has.
    pub local_world_size: usize,
    /// Rank 0's host.
    pub master_addr: String,
    /// Where rank 0 listens.
    pub master_port: u16,
}

impl World {
    /// The only process.
    pub fn solo() -> Self {
        let [rank, local_rank] = [0; 2];
        Self { rank, world_size: 1, local_rank, local_world_size: 1, master_addr: "127.0.0.1".into(), master_port: 0 }
    }

    /// What the launcher that started this process says of it, by `variable`s of the environment:
    /// torchrun's, which Kubernetes' operators set too, else those of a Slurm step. `None` where no
    /// launcher did.
    ///
    /// # Errors
    /// The user's: a variable that is missing beside the others, or is no number in its range.
    pub fn from_launcher(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let parse =
                |text: String| text.trim().parse().map_err(|_| user_error!("{name} = {text:?}: needs a number from 0"));
            variable(name).map(parse).transpose()
        };
        let needed = |name: &str, beside: &str| {
            number(name)?.ok_or_else(|| user_error!("{beside} is set, {name} is not: a launcher sets both"))
        };
        let port = |otherwise: u16| match number("MASTER_PORT")? {
            None => Ok(otherwise),
            Some(port) => u16::try_from(port)
                .ok()
                .filter(|&port| port > 0)
                .ok_or_else(|| user_error!("MASTER_PORT = {port}: needs a port, 1 to 65535")),
        };
        let world = if let Some(rank) = number("RANK")? {
            let world_size = needed("WORLD_SIZE", "RANK")?;
            let local_rank = number("LOCAL_RANK")?.unwrap_or(0);
            // torchrun's agent has a store of its own at the port that it names.
            let taken = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
            Self {
                rank,
                world_size,
                local_rank,
                local_world_size: number("LOCAL_WORLD_SIZE")?.unwrap_or(local_rank + 1),
                master_addr: match variable("MASTER_ADDR") {
                    Some(address) => address,
                    None if world_size == 1 => "127.0.0.1".into(),
                    None => return Err(user_error!("RANK is set, MASTER_ADDR is not: set it to rank 0's host")),
                },
                master_port: port(PORT)?.checked_add(u16::from(taken)).unwrap_or(PORT),
            }
        } else if let (Some(rank), Some(_)) = (number("SLURM_PROCID")?, number("SLURM_STEP_ID")?) {
            let world_size = match number("SLURM_STEP_NUM_TASKS")? {
                Some(tasks) => tasks,
                None => needed("SLURM_NTASKS", "SLURM_PROCID")?,
            };
            let local_rank = needed("SLURM_LOCALID", "SLURM_PROCID")?;
            let hosts =
                ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"].iter().find_map(|n| variable(n));
            let first = hosts.as_deref().and_then(first_host);
            // Jobs that share a host do not meet at one port.
            let job = number("SLURM_JOB_ID")?.unwrap_or(0) + number("SLURM_STEP_ID")?.unwrap_or(0);
            let tasks = variable("SLURM_STEP_TASKS_PER_NODE").or_else(|| variable("SLURM_TASKS_PER_NODE"));
            Self {
                rank,
                world_size,
                local_rank,
                local_world_size: tasks
                    .and_then(|tasks| tasks_of_node(&tasks, number("SLURM_NODEID").ok()??))
                    .unwrap_or(local_rank + 1),
                master_addr: variable("MASTER_ADDR")
                    .or(first)
                    .ok_or_else(|| user_error!("Slurm names no host: set MASTER_ADDR to that of the first task"))?,
                master_port: port(PORT + (job % 1000) as u16)?,
            }
        } else {
            return Ok(None);
        };
        if world.rank >= world.world_size {
            return Err(user_error!(
                "rank {} of a world of {}: needs a rank below the world size",
                world.rank,
                world.world_size
            ));
        }
        if world.local_rank >= world.local_world_size {
            return Err(user_error!(
                "local rank {} of {} on this machine: needs a local rank below their number",
                world.local_rank,
                world.local_world_size
            ));
        }
        Ok(Some(world))
    }
}

/// Processes to start on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Processes on each machine.
    pub nproc_per_node: usize,
    /// Machines.
    pub nnodes: usize,
    /// This machine, from 0.
    pub node_rank: usize,
    /// The first machine.
    pub master_addr: String,
    /// Where its rank 0 listens; 0 is any that is free.
    pub master_port: u16,
    /// Variables for the processes, where the environment does not have them.
    pub variables: Vec<(String, String)>,
}

/// `resourceconfig.json`.
#[derive(Deserialize)]
struct ResourceConfig {
    current_host: String,
    hosts: Vec<String>,
    network_interface_name: Option<String>,
    current_instance_type: Option<String>,
}

impl Launch {
    /// On this machine alone.
    pub fn local(nproc_per_node: usize) -> Self {
        let master_addr = "127.0.0.1".into();
        Self { nproc_per_node, nnodes: 1, node_rank: 0, master_addr, master_port: 0, variables: Vec::new() }
    }

    /// What SageMaker says in a training container, if this is one: `file` is [`RESOURCE_CONFIG`].
    /// Hosts are ranked by name, as SageMaker's own launchers do.
    ///
    /// # Errors
    /// A file that cannot be read, or does not name the current host.
    pub fn from_sagemaker(file: &Path, nproc_per_node: usize) -> Result<Option<Self>> {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| file.display().to_string()),
        };
        let mut config: ResourceConfig =
            serde_json::from_str(&text).with_context(|| format!("{} is no resource config", file.display()))?;
        config.hosts.sort();
        let node_rank = config.hosts.iter().position(|host| *host == config.current_host).with_context(|| {
            format!("{}: current_host {:?} is none of {:?}", file.display(), config.current_host, config.hosts)
        })?;
        let mut variables = Vec::new();
        let mut set = |name: &str, value: &str| variables.push((name.to_owned(), value.to_owned()));
        if let Some(interface) = &config.network_interface_name {
            set("NCCL_SOCKET_IFNAME", interface);
        }
        // AWS's advice for NCCL over EFA, where an instance has it.
        let instance = config.current_instance_type.as_deref().unwrap_or_default().trim_start_matches("ml.");
        let is = |families: &[&str]| families.iter().any(|family| instance.starts_with(family));
        if is(&["p4d.", "p4de.", "p5.", "g5.48xlarge"]) {
            set("FI_PROVIDER", "efa");
            set("NCCL_PROTO", "simple");
        }
        if is(&["p4d.", "p4de."]) {
            set("FI_EFA_USE_DEVICE_RDMA", "1");
        }
        Ok(Some(Self {
            nproc_per_node,
            nnodes: config.hosts.len(),
            node_rank,
            master_addr: config.hosts[0].clone(),
            master_port: SAGEMAKER_PORT,
            variables,
        }))
    }

    /// How many processes there are on all machines.
    pub fn world_size(&self) -> usize {
        self.nnodes * self.nproc_per_node
    }
}

/// The first of a list such as `gpu[07-09,12],login1`.
fn first_host(list: &str) -> Option<String> {
    let Some((prefix, rest)) = list.split_once('[').filter(|(prefix, _)| !prefix.contains(',')) else {
        return list.split(',').next().filter(|host| !host.is_empty()).map(str::to_owned);
    };
    let (numbers, after) = rest.split_once(']')?;
    let first = numbers.split([',', '-']).next()?;
    let suffix = after.split(',').next().unwrap_or_default();
    Some(format!("{prefix}{first}{suffix}"))
}

/// How many tasks a node has, by a list such as `4(x2),3`.
fn tasks_of_node(list: &str, node: usize) -> Option<usize> {
    let mut before = 0;
    for item in list.split(',') {
        let (tasks, times) =
            item.split_once("(x").map_or((item, "1"), |(tasks, times)| (tasks, times.trim_end_matches(')')));
        before += times.parse::<usize>().ok()?;
        if node < before {
            return tasks.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(variables: &[(&str, &str)]) -> Result<Option<World>> {
        World::from_launcher(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn torchruns_variables() {
        assert_eq!(world(&[("PATH", "/bin")]).unwrap(), None);
        let all = [
            ("RANK", "5"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "a"),
            ("MASTER_PORT", "1234"),
        ];
        let (rank, local_rank, master_addr) = (5, 1, "a".to_owned());
        let expected = World { rank, world_size: 8, local_rank, local_world_size: 4, master_addr, master_port: 1234 };
        assert_eq!(world(&all).unwrap(), Some(expected.clone()));
        let under_agent = [&all[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(world(&under_agent).unwrap(), Some(World { master_port: 1235, ..expected }));
        for (variables, message) in [
            (&[("RANK", "1")][..], "RANK is set, WORLD_SIZE is not: a launcher sets both"),
            (&[("RANK", "x")], "RANK = \"x\": needs a number from 0"),
            (&[("RANK", "1"), ("WORLD_SIZE", "2")], "RANK is set, MASTER_ADDR is not: set it to rank 0's host"),
            (
                &[("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")],
                "rank 2 of a world of 2: needs a rank below the world size",
            ),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "0")],
                "local rank 0 of 0 on this machine: needs a local rank below their number",
            ),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "70000")],
                "MASTER_PORT = 70000: needs a port, 1 to 65535",
            ),
        ] {
            assert_eq!(world(variables).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn slurms_variables() {
        let step = [
            ("SLURM_PROCID", "6"),
            ("SLURM_LOCALID", "2"),
            ("SLURM_NTASKS", "7"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_JOB_ID", "4711"),
            ("SLURM_NODEID", "1"),
            ("SLURM_STEP_NODELIST", "gpu[07-09,12]"),
            ("SLURM_STEP_TASKS_PER_NODE", "4,3"),
        ];
        let got = world(&step).unwrap().unwrap();
        let master_addr = "gpu07".to_owned();
        assert_eq!(
            got,
            World { rank: 6, world_size: 7, local_rank: 2, local_world_size: 3, master_addr, master_port: 29500 + 711 }
        );
        assert_eq!(world(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "7")]).unwrap(), None, "a batch script is no step");
        for (list, first) in [("a", "a"), ("a,b", "a"), ("a[1-3],b", "a1"), ("a[001,7]x,b", "a001x"), ("a,b[1-2]", "a")]
        {
            assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
        }
        assert_eq!([0, 1, 2, 3].map(|node| tasks_of_node("4(x2),3", node)), [Some(4), Some(4), Some(3), None]);
    }

    #[test]
    fn sagemakers_hosts_are_ranked_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("resourceconfig.json");
        assert_eq!(Launch::from_sagemaker(&file, 8).unwrap(), None);
        let config = r#"{"current_host": "algo-2", "hosts": ["algo-1", "algo-2", "algo-10"], "network_interface_name": "eth0", "current_instance_type": "ml.p4d.24xlarge"}"#;
        std::fs::write(&file, config).unwrap();
        let launch = Launch::from_sagemaker(&file, 8).unwrap().unwrap();
        assert_eq!((launch.nnodes, launch.node_rank, launch.world_size()), (3, 2, 24));
        assert_eq!((launch.master_addr.as_str(), launch.master_port), ("algo-1", 7777));
        let names: Vec<_> = launch.variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            names,
            ["NCCL_SOCKET_IFNAME=eth0", "FI_PROVIDER=efa", "NCCL_PROTO=simple", "FI_EFA_USE_DEVICE_RDMA=1"]
        );
        std::fs::write(&file, config.replace("algo-2\", \"hosts", "algo-3\", \"hosts")).unwrap();
        assert!(
            Launch::from_sagemaker(&file, 8).unwrap_err().to_string().contains("current_host \"algo-3\" is none of")
        );
    }
}
