//! What the programs share that benches/peers/run.sh compares: options, where the data lies, and the line of JSON that
//! each ends with.

use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use clap::Args;
use kiln::config::available_threads;
use serde_json::{Value, json};

/// Options of every program.
#[derive(Args)]
pub struct Common {
    /// What it is called in the line
    #[arg(default_value = "")]
    workload: String,
    /// Threads, or workers of one thread each
    #[arg(long, default_value_t = available_threads())]
    pub threads: usize,
    /// How often the thing is timed
    #[arg(long, default_value_t = 3)]
    pub steps: usize,
    /// How often it is done before that
    #[arg(long, default_value_t = 1)]
    pub warmup: usize,
    /// A folder that benches/peers/prepare.py made, by default peers/minilm
    #[arg(long)]
    model: Option<PathBuf>,
    /// cargo bench adds it
    #[arg(long = "bench", hide = true)]
    _bench: bool,
}

impl Common {
    /// The model's folder.
    pub fn model(&self) -> Result<PathBuf> {
        fetched(self.model.as_deref(), "peers/minilm")
    }

    /// Prints the line: `seconds` of each step, then `figures`.
    pub fn print(
        &self,
        contestant: &str,
        seconds: &[f64],
        figures: Value,
        packages: &[&str],
        notes: &[&str],
    ) -> Result<()> {
        let mut line = json!({
            "contestant": contestant, "workload": self.workload, "threads": self.threads, "seconds": seconds,
        });
        let versions: serde_json::Map<_, _> = packages
            .iter()
            .map(|package| Ok(((*package).to_owned(), locked(package)?.into())))
            .collect::<Result<_>>()?;
        let last = json!({ "peak_rss_bytes": peak_rss()?, "versions": versions, "notes": notes });
        for more in [figures, last] {
            line.as_object_mut()
                .into_iter()
                .for_each(|line| line.extend(more.as_object().cloned().unwrap_or_default()));
        }
        println!("{line}");
        Ok(())
    }
}

/// `given`, or `name` in the data of kiln's cache.
pub fn fetched(given: Option<&Path>, name: &str) -> Result<PathBuf> {
    let cache = env::var_os("KILN_CACHE").filter(|cache| !cache.is_empty()).map(PathBuf::from);
    let cache = cache.or_else(|| Some(env::home_dir()?.join(".cache/kiln")));
    let default = || Some(cache?.join("data").join(name));
    let path = given.map(Path::to_owned).or_else(default).context("neither KILN_CACHE nor HOME is set")?;
    ensure!(
        path.exists(),
        "{} is not there: benches/peers/run.sh --prepare makes what the benches read",
        path.display()
    );
    Ok(path)
}

/// The result of `f` and the seconds it took.
pub fn timed<T>(f: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let started = Instant::now();
    Ok((f()?, started.elapsed().as_secs_f64()))
}

/// The version of a package in Cargo.lock.
fn locked(package: &str) -> Result<String> {
    let entry = format!("name = \"{package}\"\nversion = \"");
    let (_, after) =
        include_str!("../Cargo.lock").split_once(&entry).with_context(|| format!("no package {package}"))?;
    Ok(after.split('"').next().unwrap_or_default().to_owned())
}

/// The most memory that this process has held.
fn peak_rss() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in /proc/self/status")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
