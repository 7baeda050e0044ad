//! From the command line and a file to one [`Config`].

use std::cell::RefCell;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{Config, ConfigError, Device, Model, Objective, Origin, document, problem, resolve, table};
use crate::error::UserError;

/// The experiment that is run where no file is named.
pub const QUICKSTART: &str = include_str!("../../experiments/quickstart.toml");

/// The folder of all experiments where nobody names one, from where the command runs.
pub const ROOT: &str = "kiln-runs";

/// What the command line lays over an experiment file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `KEY=VALUE` of each `--set`, in order.
    pub sets: Vec<String>,
    /// `--root`.
    pub root: Option<PathBuf>,
    /// `--threads`: to train and to infer with.
    pub threads: Option<usize>,
    /// How many processes train together on this machine, and share its threads; 0 is one.
    pub ranks: usize,
}

impl Config {
    /// Reads `file`, or else the embedded [`QUICKSTART`], with `overrides` over it.
    ///
    /// # Errors
    /// A [`UserError`]: the file cannot be read, or a [`ConfigError`] with all its mistakes.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> anyhow::Result<Self> {
        match file {
            None => Self::parse(QUICKSTART, "quickstart.toml (embedded)", Path::new(""), overrides),
            Some(file) => {
                let shown = file.display().to_string();
                let text = std::fs::read_to_string(file)
                    .with_context(|| format!("cannot read the experiment file {shown}"))
                    .map_err(UserError)?;
                Self::parse(&text, &shown, file.parent().unwrap_or(Path::new("")), overrides)
            }
        }
        .map_err(|error| UserError(error.into()).into())
    }

    /// Reads the text of an experiment file. `file` names it in errors, its relative paths start
    /// from `base`.
    ///
    /// # Errors
    /// All mistakes in the text and in `overrides`.
    pub fn parse(text: &str, file: &str, base: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        let error = |problems| ConfigError::new(file, text, problems);
        let mut root = document::parse(text).map_err(error)?;
        let mut problems: Vec<_> =
            overrides.sets.iter().filter_map(|set| document::set(&mut root, set).err()).collect();
        problems.extend(overrides.lay(&mut root).err());

        let notes = table::Notes { base, ranks: overrides.ranks.max(1), problems: RefCell::new(problems) };
        let root = table::Table::root(&notes, &root);
        let config = resolve::config(&root);
        root.finish();
        match config {
            Some(config) if notes.problems.borrow().is_empty() => {
                Ok(Self { text: overrides.comment(text), sets: overrides.sets.clone(), ..config })
            }
            _ => Err(error(notes.problems.into_inner())),
        }
    }

    /// SHA-256 of everything in the configuration that decides what the trained models are, given
    /// the data: two runs with the same hash and the same snapshot are the same training.
    /// Not in it: names of places, the run's number, threads and devices, how the export is run, and whether a
    /// quantised one is made beside it: a run whose quantised model fails its gate goes on without.
    pub fn hash(&self) -> String {
        // Infallible: plain values with string keys.
        hex(&Sha256::digest(serde_json::to_vec(&self.decisive()).unwrap_or_default()))
    }

    /// As [`hash`](Self::hash), for machines that have the same files in other places.
    pub fn hash_anywhere(&self) -> String {
        let mut config = self.clone();
        for model in &mut config.models {
            if let Origin::Folder(folder) = &mut model.origin {
                *folder = PathBuf::new();
            }
        }
        config.hash()
    }

    /// What [`Config::hash`] is of.
    pub(crate) fn decisive(&self) -> impl Serialize {
        let mut models = self.models.clone();
        for model in &mut models {
            model.train.threads = 0;
            model.train.device = Device::Auto;
            model.train.micro_batch_auto = false;
            if let Origin::Folder(folder) = &mut model.origin
                && let Ok(absolute) = std::path::absolute(&folder)
            {
                *folder = absolute;
            }
        }
        #[derive(Serialize)]
        struct Opset {
            opset: u32,
        }
        #[derive(Serialize)]
        struct Decisive {
            objective: Objective,
            model: Vec<Model>,
            export: Opset,
        }
        Decisive { objective: self.objective, model: models, export: Opset { opset: self.export.opset } }
    }
}

impl Overrides {
    /// Lays the options that have a name of their own over the tree.
    fn lay(&self, root: &mut document::Node) -> Result<(), problem::Problem> {
        use document::Value;
        if let Some(folder) = &self.root {
            let flag = format!("--root {}", folder.display()).into();
            document::lay(root, &["root"], Value::String(folder.to_string_lossy().into_owned()), &flag)?;
        }
        if let Some(threads) = self.threads {
            let flag = format!("--threads {threads}").into();
            let mut paths = vec!["train.threads".to_owned(), "infer.workers".to_owned()];
            paths.extend((0..root.items("model")).map(|index| format!("model.{index}.train.threads")));
            for path in paths {
                let path: Vec<&str> = path.split('.').collect();
                document::lay(root, &path, Value::Integer(threads as i64), &flag)?;
            }
        }
        Ok(())
    }

    /// The experiment file with these options as comments above it.
    fn comment(&self, text: &str) -> String {
        let mut commented = String::new();
        for set in &self.sets {
            let _ = writeln!(commented, "# --set {}", set.replace('\n', "\n# "));
        }
        commented + text
    }
}

/// CPU threads that this process may use: its affinity, or the cgroup's quota (v1 or v2, rounded
/// down) where that is less; 1 at least.
pub fn available_threads() -> usize {
    // The standard library reads both.
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory that this process may use: the machine's, or a cgroup's limit (v1 or v2) where that
/// is less; `None` where the system does not say.
pub fn available_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| {
        let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        total.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| 1024 * kilobytes)
    });
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|line| {
        // `0::/path` is version 2, `4:memory:/path` version 1.
        let (folder, file, path) = match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            ["0", "", path] => ("/sys/fs/cgroup", "memory.max", path),
            [_, "memory", path] => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", path),
            _ => return None,
        };
        // A limit of any group above holds too; a container sees its own group as the root.
        let groups = Path::new(path).ancestors().map(|group| group.to_string_lossy().into_owned());
        groups.filter_map(|group| read(&format!("{folder}{group}/{file}"))?.trim().parse::<u64>().ok()).min()
    });
    machine.into_iter().chain(limits).min()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
