//! The command line, as clap reads it. What it means is in [`crate::commands`].

use std::ops::Range;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{Overrides, Processes};
use crate::data::sample;

/// Fine-tunes transformer classifiers: text in, a tested ONNX model out.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, propagate_version = true, disable_help_subcommand = true)]
#[command(
    after_help = "Exit codes: 0 done; 1 the machine's fault or kiln's; 2 yours to put right, with what to do; 130 \
and 143 ended by SIGINT and SIGTERM, with a checkpoint written where a training was going on. NO_COLOR turns colours \
off; where stdout or stderr is no terminal there are none."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// What every command takes.
    #[command(flatten)]
    pub options: Options,
}

/// Options of every command.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Options everywhere")]
pub struct Options {
    /// The folder that holds all experiments [default: the file's `root`, or kiln-runs]
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Sets any key of the experiment file, lists by index, as train.epochs=1 or model.0.name=a
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Prints JSON on stdout, and nothing else there: one value, but of train a line for each event
    #[arg(long, global = true)]
    pub json: bool,
    /// Says more of what it does
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Says only results, on stdout, and errors, on stderr
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Never fetches anything
    #[arg(long, global = true)]
    pub offline: bool,
    /// CPU threads [default: what the cgroup's quota allows]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

impl Options {
    /// What these options lay over an experiment file.
    pub fn overrides(&self) -> Overrides {
        Overrides { sets: self.set.clone(), root: self.root.clone(), threads: self.threads.map(usize::from), ranks: 1 }
    }

    /// Says what only `-v` asks for.
    pub fn note(&self, message: impl FnOnce() -> String) {
        if self.verbose {
            crate::error::say(message());
        }
    }

    /// The folder of all experiments, for commands that read no experiment file.
    pub fn root(&self) -> PathBuf {
        self.root.clone().unwrap_or_else(|| PathBuf::from(crate::config::ROOT))
    }
}

/// One verb each.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Goes the whole way: prepare, train, export with certificate, test, compare, print the table
    #[command(after_help = "Examples:
  kiln train                                    the embedded sample, end to end
  kiln train experiments/bbc.toml
  kiln train experiments/bbc.toml --set train.epochs=1 --stop-after train
  kiln train experiments/bbc.toml --resume bbc/3
  kiln train experiments/bbc.toml --nproc-per-node 4")]
    Train(Train),
    /// Reads, deduplicates, splits and encodes the data
    #[command(after_help = "Example:
  kiln prepare experiments/bbc.toml")]
    Prepare(File),
    /// Exports a trained run's models to ONNX and certifies them
    #[command(after_help = "Example:
  kiln export bbc/3 --model minilm
  kiln export bbc/3 --set export.quantize=int8      a quantised model.int8.onnx beside each")]
    Export(Export),
    /// Tests a run's ONNX models on the unseen test part, or predicts on other rows
    #[command(after_help = "Examples:
  kiln infer                                    the newest run, all models
  kiln infer bbc/3 --model minilm --input new.csv --output predictions.parquet
  kiln infer bbc/3 --input new.csv --output predictions.parquet --int8")]
    Infer(Infer),
    /// Compares tested models on the same test rows: a run's, or those of several runs on one snapshot
    #[command(after_help = "Examples:
  kiln compare                                  the newest run's models
  kiln compare bbc/3 bbc/5
  kiln compare bbc/3 bbc/5 --model minilm --json

It prints the test part's figures as a table, then for every two models the difference of their macro F1 with its \
95 % interval (paired bootstrap) and the p-value of McNemar's exact test (of accuracy). Where the interval holds 0, \
it is a tie. comparison.json has all of it, and the rows that the models predict otherwise. It lies in the run's \
folder where it is of all models of one run, else in a run of its own.")]
    Compare(Compare),
    /// Makes a run's report.html again from its files: curves, matrices, mistakes, certificate, in one page
    #[command(after_help = "Examples:
  kiln report                                   the newest run
  kiln report bbc/3 --output bbc-3.html

`kiln train` and `kiln compare` leave the page in the run's folder; it is one file that loads nothing.")]
    Report(Report),
    /// Lists runs, the newest first
    #[command(after_help = "Examples:
  kiln runs
  kiln runs bbc --json
  kiln runs /mnt/team/kiln-runs

The best model is chosen on validation; its figures on the test part stand beside.")]
    Runs(Runs),
    /// Validates an experiment file without running it
    #[command(after_help = "Example:
  kiln check experiments/bbc.toml --set train.batch_size=32")]
    Check(File),
    /// Trains a run's models again, and says whether all is the same to the bit
    #[command(after_help = "Examples:
  kiln repro bbc/3
  kiln repro bbc/3 --output again      keeps what was made")]
    Repro(Repro),
    /// Measures how fast N processes train together, for each N
    #[command(after_help = "Examples:
  kiln bench                                    1 and 2 processes on the embedded sample
  kiln bench experiments/bbc.toml --world-sizes 1,2,4,8 --output scaling
  kiln bench experiments/bbc.toml --from scaling/bench.json --simulate --times-as-fast 100")]
    Bench(Bench),
    /// Lists the architectures that kiln trains
    #[command(after_help = "Example:
  kiln models --json")]
    Models,
    /// Writes the embedded sample's documents, to look at or to train on
    #[command(after_help = "Examples:
  kiln sample --output sample.csv
  kiln sample --output sample.parquet --seed 7 --count 500")]
    Sample(Sample),
    /// Prints a script that completes kiln's commands and options in a shell
    #[command(after_help = "Examples:
  kiln completions bash > ~/.local/share/bash-completion/completions/kiln
  kiln completions zsh > ~/.zfunc/_kiln         where fpath has ~/.zfunc
  kiln completions fish > ~/.config/fish/completions/kiln.fish")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Prints the manual page of kiln, or writes a page for each command, as packages do
    #[command(hide = true)]
    Man(Man),
}

/// The experiment file of a command.
#[derive(Args, Clone, Debug, Default)]
pub struct File {
    /// The experiment file [default: the embedded quickstart]
    pub file: Option<PathBuf>,
}

/// `kiln train`
#[derive(Args, Clone, Debug, Default)]
pub struct Train {
    /// The experiment file.
    #[command(flatten)]
    pub experiment: File,
    /// Ends after this stage
    #[arg(long, value_name = "STAGE")]
    pub stop_after: Option<Stage>,
    /// Takes a prepared snapshot as it is, in place of `data`
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Goes on with this run: a run folder or experiment/run_num [default: the newest unfinished
    /// with the same configuration and data]
    #[arg(long, value_name = "RUN", conflicts_with = "new")]
    pub resume: Option<String>,
    /// Starts a new run, whatever is unfinished
    #[arg(long)]
    pub new: bool,
    /// Writes trace.json into each model's folder, for ui.perfetto.dev: every op, wait and all-reduce of
    /// these steps, counted from 0 at this start [alone: 10..20], and all evaluations and checkpoints; of rank 0
    #[arg(long, value_name = "FROM..TO", num_args = 0..=1, require_equals = true, default_missing_value = "10..20", value_parser = steps)]
    pub profile: Option<Range<u64>>,
    /// Shows the training on the whole terminal: curves, rate, memory; `q` or Ctrl-C ends it with a checkpoint
    #[arg(long)]
    pub tui: bool,
    /// Where the processes run that train together.
    #[command(flatten)]
    pub nodes: Nodes,
}

/// Processes that train together. Under torchrun, Slurm or SageMaker nothing of it need be said.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Many processes")]
pub struct Nodes {
    /// Processes to start on this machine: a number, or one for each `gpu` [default:
    /// train.distributed.nproc_per_node]
    #[arg(long, value_name = "N|gpu", value_parser = processes)]
    pub nproc_per_node: Option<Processes>,
    /// Machines
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub nnodes: u16,
    /// This machine, from 0
    #[arg(long, value_name = "N", default_value_t = 0, requires = "master_addr")]
    pub node_rank: u16,
    /// Machine 0, as the others reach it
    #[arg(long, value_name = "HOST", requires = "nnodes")]
    pub master_addr: Option<String>,
    /// Where machine 0 listens
    #[arg(long, value_name = "PORT", default_value_t = 29500, value_parser = clap::value_parser!(u16).range(1..))]
    pub master_port: u16,
}

fn processes(text: &str) -> Result<Processes, String> {
    match text.parse() {
        Ok(count @ 1..=1024) => Ok(Processes::Count(count)),
        _ if text == "gpu" => Ok(Processes::Gpu),
        _ => Err("needs a number from 1 to 1024, or gpu".into()),
    }
}

/// A stage of `kiln train`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// The data stands, encoded.
    Prepare,
    /// The best weights stand.
    Train,
    /// The certified ONNX models stand.
    Export,
}

/// A run and which of its models.
#[derive(Args, Clone, Debug, Default)]
pub struct Export {
    /// A run folder or experiment/run_num [default: the newest]
    pub run: Option<String>,
    /// One of the run's models [default: all]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
}

/// `kiln infer`
#[derive(Args, Clone, Debug, Default)]
pub struct Infer {
    /// The run and its models.
    #[command(flatten)]
    pub target: Export,
    /// Rows to predict on, in place of the test part; they need no labels
    #[arg(long, value_name = "FILE", requires = "output")]
    pub input: Option<PathBuf>,
    /// Where to write the predictions, as Parquet
    #[arg(long, value_name = "FILE", requires = "input")]
    pub output: Option<PathBuf>,
    /// Predicts with model.int8.onnx, which `export.quantize = "int8"` makes; the test is of both models
    #[arg(long, requires = "input")]
    pub int8: bool,
    /// Writes probabilities at the model's temperature, fitted on validation; predictions stay the same
    #[arg(long)]
    pub calibrated: bool,
}

/// `kiln compare`
#[derive(Args, Clone, Debug, Default)]
pub struct Compare {
    /// Run folders or experiment/run_num, on the same snapshot [default: the newest]
    pub runs: Vec<String>,
    /// Of each run these models alone; may be given more than once [default: all]
    #[arg(long, value_name = "NAME")]
    pub model: Vec<String>,
}

/// `kiln report`
#[derive(Args, Clone, Debug, Default)]
pub struct Report {
    /// A run folder or experiment/run_num [default: the newest]
    pub run: Option<String>,
    /// Where to write the page [default: report.html in the run's folder]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `kiln runs`
#[derive(Args, Clone, Debug, Default)]
pub struct Runs {
    /// An experiment under the root, or another root folder [default: all experiments under --root]
    #[arg(value_name = "EXPERIMENT|ROOT")]
    pub place: Option<String>,
}

/// `kiln repro`
#[derive(Args, Clone, Debug, Default)]
pub struct Repro {
    /// A run folder or experiment/run_num [default: the newest]
    pub run: Option<String>,
    /// Keeps what is trained, in this folder [default: it is thrown away]
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// `kiln bench`
#[derive(Args, Clone, Debug)]
pub struct Bench {
    /// The experiment file: its first model is measured.
    #[command(flatten)]
    pub experiment: File,
    /// Processes to measure with; efficiency is by the first
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,2", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub world_sizes: Vec<u16>,
    /// Optimizer steps that count
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Optimizer steps before them
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub warmup: u64,
    /// How often all of it is done: on a busy machine the world sizes take turns
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub rounds: u16,
    /// Keeps the global batch as it is [default: each process gets train.batch_size]
    #[arg(long)]
    pub strong: bool,
    /// Writes bench.json, bench.md and scaling.png into this folder
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Takes the measurements of an earlier bench.json in place of making them
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// Predicts the efficiency on many GPUs from the step of one process
    #[arg(long)]
    pub simulate: bool,
    /// What is simulated.
    #[command(flatten)]
    pub network: Network,
    /// Where rank 0 writes what it has measured: the agent gives it to the ranks
    #[arg(long, hide = true)]
    pub measurement: Option<PathBuf>,
}

/// Computers that are simulated.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Simulation")]
pub struct Network {
    /// GPUs in all
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "8,16,32,64,128,256,512", value_parser = clap::value_parser!(u32).range(1..))]
    pub gpus: Vec<u32>,
    /// GPUs of a machine
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    pub gpus_per_machine: u16,
    /// GB/s in each direction between GPUs of a machine
    #[arg(long, value_name = "GB/S", default_value_t = 450.0, value_parser = positive)]
    pub within: f64,
    /// Gb/s in each direction between a machine and the others: each is simulated
    #[arg(long, value_name = "GBIT/S,…", value_delimiter = ',', default_value = "400,3200", value_parser = positive)]
    pub between: Vec<f64>,
    /// Microseconds for a hop within a machine
    #[arg(long, value_name = "US", default_value_t = 3.0, value_parser = positive)]
    pub latency_within: f64,
    /// Microseconds for a hop between machines
    #[arg(long, value_name = "US", default_value_t = 15.0, value_parser = positive)]
    pub latency_between: f64,
    /// The GPU computes so many times as fast as what was measured
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = positive)]
    pub times_as_fast: f64,
}

fn steps(text: &str) -> Result<Range<u64>, String> {
    let range = text.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    range.filter(|range| !range.is_empty()).ok_or("needs two numbers, the second the higher, as 10..20".into())
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0).ok_or("needs a number above 0".into())
}

/// `kiln sample`
#[derive(Args, Clone, Debug)]
pub struct Sample {
    /// Where to write: .csv, .jsonl or .parquet, or, without an extension, a folder of text files
    #[arg(long, short, value_name = "PATH", default_value = "sample.jsonl")]
    pub output: PathBuf,
    /// Seed of the generator
    #[arg(long, default_value_t = sample::SEED)]
    pub seed: u64,
    /// Documents to write
    #[arg(long, value_name = "N", default_value_t = sample::COUNT)]
    pub count: usize,
}

/// `kiln man`
#[derive(Args, Clone, Debug, Default)]
pub struct Man {
    /// Writes kiln.1 and a page for each command into this folder
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}
