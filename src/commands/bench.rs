//! `kiln bench`: how fast many processes train together.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::ranks;
use crate::cli::{Bench, Network, Options};
use crate::config::{Config, Overrides};
use crate::data;
use crate::dist::{Launch, Links, Prediction, World, simulate};
use crate::error::say;
use crate::metrics::scaling::{Figures, Measured};
use crate::store::{self, Experiment};
use crate::train::{Job, Load, Signals, measure};
use crate::{hub, report, user_error};

/// bench.json.
#[derive(Serialize, Deserialize)]
struct Report {
    kiln: String,
    experiment: String,
    model: String,
    /// Whether the global batch is the same for all worlds.
    strong: bool,
    worlds: Vec<Row>,
    #[serde(default)]
    simulations: Vec<Simulation>,
}

#[derive(Serialize, Deserialize)]
struct Row {
    #[serde(flatten)]
    measured: Measured,
    figures: Figures,
}

#[derive(Serialize, Deserialize)]
struct Simulation {
    links: Links,
    /// How many times as fast as the measured device the simulated one computes.
    times_as_fast: f64,
    predictions: Vec<Prediction>,
}

/// Measures, and prints the table.
///
/// # Errors
/// The user's, of the file and the options; what training says.
pub fn run(args: &Bench, options: &Options) -> Result<ExitCode> {
    let file = args.experiment.file.as_deref();
    match (&args.measurement, ranks::launched()?) {
        (Some(to), Some(world)) => return rank(args, options, world, to),
        (None, None) => {}
        _ => return Err(user_error!("kiln bench starts its processes itself: run it without a launcher")),
    }
    let mut report = match &args.from {
        Some(from) => store::read_json(from)?,
        None => {
            let config = Config::load(file, &options.overrides())?;
            let signals = Signals::listen()?;
            let worlds = match worlds(args, options, &signals)? {
                Ok(worlds) => worlds,
                Err(code) => return Ok(signals.received().map_or(code, |signal| ExitCode::from(signal.exit_code()))),
            };
            Report::new(&config, args.strong, worlds)?
        }
    };
    if args.simulate {
        report.simulations = simulations(&report, &args.network)?;
    }
    if let Some(dir) = &args.output {
        store::write_json(&dir.join("bench.json"), &report)?;
        store::write_bytes(&dir.join("bench.md"), report.markdown().as_bytes())?;
        report::scaling_plot(&report.title(), &report.rows(), &dir.join("scaling.png"))?;
    }
    if options.json {
        super::print_json(&report)?;
    } else {
        super::print(report.markdown().trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One rank's part: it computes with the others, and rank 0 writes what came of it.
fn rank(args: &Bench, options: &Options, world: World, to: &Path) -> Result<ExitCode> {
    let overrides = Overrides { ranks: world.local_world_size, ..options.overrides() };
    let mut config = Config::load(args.experiment.file.as_deref(), &overrides)?;
    hub::fetch(&mut config, options.offline, options.quiet || world.local_rank > 0, hub::Scope::Whole)?;
    let ranks = ranks::join(world, &config)?;
    let work = || {
        let dir = Experiment::new(&config.root, &config.name).data_dir();
        let snapshot = ranks.in_turn(|| data::prepare(&config.data, &dir))?;
        let model = config.models.first().context("an experiment has a model")?;
        let quiet = !options.verbose || !ranks.is_main();
        let job = Job { config: &config, model, snapshot: &snapshot, files: None, quiet, profile: None, tui: false };
        let load = Load { warmup: args.warmup, steps: args.steps, strong: args.strong };
        let measured = measure(&ranks, &job, load)?;
        if ranks.is_main() { store::write_json(to, &measured) } else { Ok(()) }
    };
    work().inspect_err(|error| ranks.abort(&format!("{error:#}")))?;
    Ok(ExitCode::SUCCESS)
}

/// Each world's measurements, or the exit code of one that failed.
fn worlds(args: &Bench, options: &Options, signals: &Signals) -> Result<Result<Vec<Measured>, ExitCode>> {
    let folder = tempfile::tempdir().context("a folder for measurements")?;
    let mut worlds: Vec<Measured> = Vec::new();
    for round in 1..=args.rounds {
        for &world_size in &args.world_sizes {
            if !options.quiet {
                let plural = if world_size == 1 { "" } else { "es" };
                say(format_args!("round {round}: {} steps by {world_size} process{plural}", args.warmup + args.steps));
            }
            let file = folder.path().join(format!("{round}-{world_size}.json"));
            let more = ["--measurement".as_ref(), file.as_os_str()];
            let code = ranks::watch(&Launch::local(world_size.into()), signals, &more)?;
            if !file.exists() {
                return Ok(Err(code)); // a rank has said why
            }
            let measured: Measured = store::read_json(&file)?;
            match worlds.iter_mut().find(|world| world.world_size == measured.world_size) {
                Some(world) => world.merge(measured),
                None => worlds.push(measured),
            }
        }
    }
    Ok(Ok(worlds))
}

impl Report {
    fn new(config: &Config, strong: bool, worlds: Vec<Measured>) -> Result<Self> {
        let first = worlds.first().context("no world was measured")?.clone();
        let row = |measured: Measured| Row { figures: measured.figures(&first), measured };
        Ok(Self {
            kiln: env!("CARGO_PKG_VERSION").into(),
            experiment: config.name.clone(),
            model: config.models.first().context("an experiment has a model")?.name.clone(),
            strong,
            worlds: worlds.into_iter().map(row).collect(),
            simulations: Vec::new(),
        })
    }

    fn rows(&self) -> Vec<(&Measured, Figures)> {
        self.worlds.iter().map(|row| (&row.measured, row.figures.clone())).collect()
    }

    fn title(&self) -> String {
        let scaling = if self.strong { "strong scaling" } else { "weak scaling" };
        let device = self.worlds.first().map_or("", |row| &row.measured.device);
        let steps = self.worlds.first().map_or(0, |row| row.measured.steps.len());
        format!("{} of {}, {scaling} on {device}, medians of {steps} steps", self.model, self.experiment)
    }

    fn markdown(&self) -> String {
        let mut text = format!("{}\n\n{}", self.title(), report::scaling_table(&self.rows()));
        for simulation in &self.simulations {
            let faster = match simulation.times_as_fast {
                1.0 => String::new(),
                times => format!(" on devices {times} times as fast"),
            };
            let table = report::prediction_table(&simulation.links, &simulation.predictions);
            text += &format!("\nPredicted{faster}: {table}");
        }
        text
    }
}

/// What the step of one process would take on many GPUs, for each network.
fn simulations(report: &Report, network: &Network) -> Result<Vec<Simulation>> {
    let alone = report.worlds.iter().find(|row| row.measured.world_size == 1);
    let profile = alone.and_then(|row| row.measured.profile.as_ref()).ok_or_else(|| {
        user_error!(
            "--simulate goes by the course of a step on one process: needs 1 in --world-sizes, and \
             train.deterministic = false"
        )
    })?;
    let times_as_fast = network.times_as_fast;
    let profile = profile.faster(times_as_fast);
    let simulation = |gigabits: &f64| {
        let links = Links {
            gpus_per_machine: network.gpus_per_machine.into(),
            within: 1e9 * network.within,
            between: 1e9 / 8.0 * gigabits,
            latency_within: 1e-6 * network.latency_within,
            latency_between: 1e-6 * network.latency_between,
        };
        let predictions = network.gpus.iter().map(|&gpus| simulate(&profile, &links, gpus as usize)).collect();
        Simulation { links, times_as_fast, predictions }
    };
    Ok(network.between.iter().map(simulation).collect())
}
