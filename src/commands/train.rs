//! `kiln train`: the whole way, or up to a stage.

use std::ops::Range;
use std::process::ExitCode;

use anyhow::Result;

use super::ranks::{self, Task};
use super::{Form, check, prepare};
use crate::cli::{Options, Stage, Train};
use crate::config::{self, Config, Overrides, Processes, Quantize};
use crate::data::{self, Part, Snapshot};
use crate::dist::{Communicator, World};
use crate::error::{say, warn};
use crate::export::{export_model, quantize_model};
use crate::infer::{Runtime, Setting, runtime};
use crate::store::{self, Choice, Experiment, ModelDir, Opened, Run, Status};
use crate::track::{Plan, Tracking};
use crate::train::{Checkpoints, Job, Outcome, Signal, Signals};
use crate::{dashboard, hub};

/// Prepares, trains, exports with a certificate, tests, and prints the table.
///
/// # Errors
/// The user's, of the file and the data; and whatever stops a stage. The run says `failed` then, and
/// goes on from its last checkpoint when it is started again.
pub fn run(args: &Train, options: &Options) -> Result<ExitCode> {
    let launched = ranks::launched()?;
    let local_ranks = launched.as_ref().map_or(1, |world| world.local_world_size);
    let overrides = Overrides { ranks: local_ranks, ..options.overrides() };
    let mut config = Config::load(args.experiment.file.as_deref(), &overrides)?;
    let world = match ranks::Part::of_this_process(&args.nodes, &config)? {
        ranks::Part::Agent(launch) if args.stop_after != Some(Stage::Prepare) => {
            return ranks::watch(&launch, &Signals::listen()?, &[]);
        }
        ranks::Part::Agent(_) => World::solo(), // preparing is one process's work
        ranks::Part::Rank(world) => world,
    };
    if world.rank > 0 && args.stop_after == Some(Stage::Prepare) {
        return Ok(ExitCode::SUCCESS);
    }
    hub::fetch(&mut config, options.offline, options.quiet || world.local_rank > 0, hub::Scope::Whole)?;
    if world.rank > 0 {
        let ranks = ranks::join(world, &config)?;
        let followed = ranks::follow(&ranks, &config, &Signals::listen()?);
        return followed.inspect_err(|error| ranks.abort(&format!("{error:#}")));
    }
    check::check(&config, args.data.as_deref())?;
    let plan = Plan::new(&config.track, |name| std::env::var(name).ok())?;
    let runtime = match args.stop_after {
        Some(Stage::Prepare | Stage::Train) => None,
        None | Some(Stage::Export) => Some(runtime::ensure(options.offline)?), // now, not after an hour of training
    };
    let ranks = ranks::join(world, &config)?;
    // lock.json says how many made it, whoever started them.
    config.distributed.nproc_per_node = Processes::Count(ranks.world_size());
    lead(args, options, (&config, &plan), runtime, &ranks).inspect_err(|error| ranks.abort(&format!("{error:#}")))
}

/// The main process's part.
fn lead(
    args: &Train,
    options: &Options,
    (config, plan): (&Config, &Plan),
    runtime: Option<&Runtime>,
    ranks: &Communicator,
) -> Result<ExitCode> {
    let experiment = Experiment::new(&config.root, &config.name);
    let snapshot = match &args.data {
        Some(dir) => Snapshot::open(dir)?,
        None => data::prepare(&config.data, &experiment.data_dir())?,
    };
    if args.stop_after == Some(Stage::Prepare) {
        return prepare::encode_and_print(config, &snapshot, options, Form::Lines);
    }

    let choice = match (&args.resume, args.new) {
        (Some(reference), _) => Choice::Resume(store::find(Some(reference), &config.root)?),
        (None, true) => Choice::New,
        (None, false) => Choice::Auto,
    };
    let Opened { run, resumed } = experiment.open_run(config, snapshot.hash(), snapshot.dir(), &choice)?;
    options.note(|| format!("snapshot {} in {}", snapshot.hash(), snapshot.dir().display()));
    if let Some(runtime) = runtime {
        options.note(|| format!("ONNX Runtime: {}", runtime.library().display()));
    }
    let tracking = Tracking::new(plan, config, &run);
    let pipeline = Pipeline {
        config,
        snapshot: &snapshot,
        run: &run,
        tracking: &tracking,
        options,
        profile: args.profile.clone(),
        tui: tui(args, options),
        ranks,
    };
    pipeline.announce(resumed)?;
    let ended = pipeline.go(runtime, args.stop_after);
    let status = match &ended {
        Ok(None) if args.stop_after.is_some() => Status::Stopped,
        Ok(None) => Status::Finished,
        Ok(Some(_)) => Status::Interrupted,
        Err(_) => Status::Failed,
    };
    let said = run.finish(status);
    tracking.end(status);
    match ended {
        Ok(signal) => {
            said?;
            if signal.is_none() {
                super::report::leave(&run, options);
            }
            Ok(signal.map_or(ExitCode::SUCCESS, |signal| ExitCode::from(signal.exit_code())))
        }
        Err(error) => {
            // What stopped the run is the news; that run.json could not say so is not.
            said.unwrap_or_else(|unsaid| say(format_args!("error: {unsaid:#}")));
            Err(error)
        }
    }
}

/// Whether the dashboard is shown: where it was asked for, and there is a terminal.
fn tui(args: &Train, options: &Options) -> bool {
    let possible = dashboard::is_possible();
    if args.tui && !possible {
        warn("--tui needs a terminal as stdin, stdout and stderr of this process: progress comes in lines");
    }
    args.tui && possible && !options.quiet
}

/// The stages after preparation, for every model of the run.
struct Pipeline<'a> {
    config: &'a Config,
    snapshot: &'a Snapshot,
    run: &'a Run,
    tracking: &'a Tracking<'a>,
    options: &'a Options,
    profile: Option<Range<u64>>,
    tui: bool,
    ranks: &'a Communicator,
}

impl Pipeline<'_> {
    /// Says which run this is, and from where it goes on.
    fn announce(&self, resumed: bool) -> Result<()> {
        let reference = self.run.reference();
        let unfinished =
            self.config.models.iter().find(|model| !self.run.model(&model.name).statistics_json().exists());
        let step = match unfinished {
            Some(model) => Checkpoints::new(self.run.model(&model.name).checkpoints(), 1).steps()?.last().copied(),
            None => None,
        };
        match (resumed, unfinished, step) {
            (true, Some(_), step) => self.say(&format!("resuming {reference} at step {}", step.unwrap_or(0))),
            (true, None, _) => self.say(&format!("resuming {reference} after training")),
            (false, ..) => self.say(&format!("run {reference} in {}", self.run.dir().display())),
        }
        Ok(())
    }

    /// Does what the run still lacks; a signal ends it early.
    fn go(&self, runtime: Option<&Runtime>, stop_after: Option<Stage>) -> Result<Option<Signal>> {
        let signals = Signals::listen()?;
        for (index, model) in self.config.models.iter().enumerate() {
            let files = self.run.model(&model.name);
            if files.statistics_json().exists() {
                continue;
            }
            let dir = std::path::absolute(self.snapshot.dir())?;
            self.ranks.from_main(Some(&Task::Train(index, self.snapshot.hash().into(), dir)))?;
            self.ranks.in_turn(|| Ok(()))?; // on other machines the snapshot is made
            if let Some(signal) = self.train(model, &files, &signals)? {
                return Ok(Some(signal));
            }
        }
        self.ranks.from_main(Some(&Task::Done))?;
        let Some(runtime) = runtime else { return Ok(None) };
        let (config, snapshot, quiet) = (self.config, self.snapshot, self.options.quiet);
        kiln_kernels::threads::set(config.infer.workers)?;
        let setting = Setting { runtime, run: self.run, config, snapshot, quiet };
        for model in &self.config.models {
            if !self.run.model(&model.name).export_json().exists() {
                let certificate = export_model(&setting, model)?;
                if self.options.json {
                    super::print_event("export", Some(&model.name), &certificate)?;
                }
                self.say(&format!("exported {}", super::export::line(&model.name, &certificate)));
            }
            if config.export.quantize == Quantize::Int8 && !self.run.model(&model.name).export_int8_json().exists() {
                let agreement = quantize_model(&setting, model)?;
                if self.options.json {
                    super::print_event("export_int8", Some(&model.name), &agreement)?;
                }
                self.say(&format!("exported {}", super::export::int8_line(&model.name, &agreement)));
            }
        }
        if stop_after.is_some() {
            return Ok(None);
        }
        if !snapshot.has(Part::Test) {
            self.say("the snapshot has no test part: nothing is tested");
            return Ok(None);
        }
        super::infer::test_and_print(&setting, &self.config.models, false, self.options, Form::Lines)?;
        if config.models.len() > 1 {
            super::compare::compare_and_print(self.run, &config.models, self.options)?;
        }
        Ok(None)
    }

    fn train(&self, model: &config::Model, files: &ModelDir, signals: &Signals) -> Result<Option<Signal>> {
        let (config, snapshot, quiet) = (self.config, self.snapshot, self.options.quiet);
        let (files, profile) = (Some((files, self.tracking)), self.profile.clone());
        let job = Job { config, model, snapshot, files, quiet, profile, tui: self.tui };
        let outcome = job.train(self.ranks, signals, |evaluation| match self.options.json {
            true => super::print_event("evaluation", Some(&model.name), evaluation),
            false => super::print(&evaluation.to_string()),
        })?;
        match outcome {
            Outcome::Finished(_) => Ok(None),
            Outcome::Interrupted(signal, step) => {
                self.say(&format!(
                    "{}: checkpoint of step {step} written; the same command resumes {}",
                    signal.name,
                    self.run.reference()
                ));
                Ok(Some(signal))
            }
        }
    }

    fn say(&self, message: &str) {
        if !self.options.quiet {
            say(message);
        }
    }
}
