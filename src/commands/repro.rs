//! `kiln repro`: a run's training made again, and held against what it was.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value};

use super::ranks::{self, Part, Task};
use super::{print, print_json};
use crate::cli::{self, Nodes, Options};
use crate::config::{Config, Origin};
use crate::data::{self, Snapshot};
use crate::dist::Communicator;
use crate::error::warn;
use crate::store::{self, Experiment, ModelDir, Pins, RunDir};
use crate::track::{self, Event, Plan, Tracking};
use crate::train::{Job, Outcome, Signals};
use crate::{hub, user_error};

/// What came of it.
#[derive(Serialize)]
struct Reproduced {
    run: String,
    identical: bool,
    /// In what this machine and this kiln are others than the run's, as `what: then, now`.
    differences: Vec<String>,
    models: BTreeMap<String, Again>,
}

/// One model, made again.
#[derive(Serialize)]
struct Again {
    identical: bool,
    /// Optimizer steps of the run.
    steps: usize,
    /// The first event that is another.
    first_difference: Option<Difference>,
    /// SHA-256 of model.safetensors, then and now.
    weights: [String; 2],
}

#[derive(Debug, PartialEq, Serialize)]
struct Difference {
    step: u64,
    what: String,
}

/// Trains a run's models again from its lock.json, elsewhere, and says whether every step, every evaluation
/// and the weights are the same to the bit: exit code 1 where they are not.
///
/// # Errors
/// The user's: a run that is not trained to its end, or whose data or base weights are not there any more as
/// they were; and what training says.
pub fn run(args: &cli::Repro, options: &Options) -> Result<ExitCode> {
    let run = store::find(args.run.as_deref(), &options.root())?;
    let pins = run.pins()?;
    let mut config = pins.config.clone();
    for model in &mut config.models {
        if let (Origin::Hub { revision, .. }, Some(commit)) = (&mut model.origin, pins.hub.get(&model.name)) {
            revision.clone_from(commit);
        }
    }
    let nodes = Nodes { nproc_per_node: Some(config.distributed.nproc_per_node), ..Nodes::default() };
    let signals = Signals::listen()?;
    let world = match Part::of_this_process(&nodes, &config)? {
        Part::Agent(launch) => return ranks::watch(&launch, &signals, &[]),
        Part::Rank(world) => world,
    };
    hub::fetch(&mut config, options.offline, options.quiet || world.local_rank > 0, hub::Scope::Whole)?;
    let main = world.rank == 0;
    let ranks = ranks::join(world, &config)?;
    let work = || match main {
        true => lead(args, options, &run, (&pins, &config), &ranks, &signals),
        false => ranks::follow(&ranks, &config, &signals),
    };
    work().inspect_err(|error| ranks.abort(&format!("{error:#}")))
}

fn lead(
    args: &cli::Repro,
    options: &Options,
    run: &RunDir,
    (pins, config): (&Pins, &Config),
    ranks: &Communicator,
    signals: &Signals,
) -> Result<ExitCode> {
    for model in &config.models {
        if !run.model(&model.name).statistics_json().exists() {
            let reference = run.reference();
            return Err(user_error!(
                "run {reference} has not trained {:?} to its end: kiln train --resume {reference} does",
                model.name
            ));
        }
    }
    let scratch = tempfile::tempdir()?;
    let root = args.output.as_deref().unwrap_or(scratch.path());
    let snapshot = snapshot(run, pins, config, root)?;
    let changed = pins.changed_base(config, snapshot.hash())?;
    if !changed.is_empty() {
        return Err(user_error!(
            "{} cannot be made again, because what it started from is not what it was: {}",
            run.reference(),
            changed.join(", ")
        ));
    }
    let now = Pins::new(config, snapshot.hash())?;
    let mut reproduced = Reproduced {
        run: run.reference(),
        identical: true,
        differences: pins.other_machine(&now),
        models: BTreeMap::new(),
    };
    for difference in &reproduced.differences {
        warn(format_args!("warning: {difference}: the last bits may be others"));
    }

    let again = Experiment::new(root, &config.name).run(run.run_num());
    let plan = Plan::default(); // metrics.jsonl alone
    let tracking = Tracking::new(&plan, config, &again);
    for (index, model) in config.models.iter().enumerate() {
        let (then, files) = (run.model(&model.name), again.model(&model.name));
        let dir = std::path::absolute(snapshot.dir())?;
        ranks.from_main(Some(&Task::Train(index, snapshot.hash().into(), dir)))?;
        ranks.in_turn(|| Ok(()))?;
        let job = Job {
            config,
            model,
            snapshot: &snapshot,
            files: Some((&files, &tracking)),
            quiet: options.quiet,
            profile: None,
            tui: false,
        };
        if let Outcome::Interrupted(signal, _) = job.train(ranks, signals, |_| Ok(()))? {
            return Ok(ExitCode::from(signal.exit_code()));
        }
        reproduced.models.insert(model.name.clone(), Again::compare(&then, &files)?);
    }
    ranks.from_main(Some(&Task::Done))?;
    reproduced.identical = reproduced.models.values().all(|again| again.identical);

    if options.json {
        print_json(&reproduced)?;
    } else {
        for (name, again) in &reproduced.models {
            print(&format!("{name}: {}", again.line()))?;
        }
    }
    Ok(if reproduced.identical { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The run's snapshot; where it is gone, made again from its source.
fn snapshot(run: &RunDir, pins: &Pins, config: &Config, root: &Path) -> Result<Snapshot> {
    if let Ok(dir) = run.snapshot_dir() {
        return Snapshot::open(&dir);
    }
    let snapshot = data::prepare(&config.data, &Experiment::new(root, &config.name).data_dir())?;
    if snapshot.hash() != pins.snapshot {
        return Err(user_error!(
            "the data of {} is not what it was: it makes snapshot {}, and was {}",
            run.reference(),
            snapshot.hash(),
            pins.snapshot
        ));
    }
    Ok(snapshot)
}

impl Again {
    fn compare(then: &ModelDir, now: &ModelDir) -> Result<Self> {
        let [events, others] = [then, now].map(|files| track::read(&files.metrics_jsonl()));
        let (events, others) = (events?, others?);
        let first_difference = first_difference(&events, &others)?;
        let weights = |files: &ModelDir| store::sha256_file(&files.model().join("model.safetensors"));
        let weights = [weights(then)?, weights(now)?];
        let steps = events.iter().filter(|event| matches!(event, Event::Step(_))).count();
        Ok(Self { identical: first_difference.is_none() && weights[0] == weights[1], steps, first_difference, weights })
    }

    fn line(&self) -> String {
        let [then, now] = &self.weights;
        let weights = match then == now {
            true => format!("model.safetensors {then}"),
            false => format!("model.safetensors was {then}, is {now}"),
        };
        match &self.first_difference {
            None if self.identical => format!("bit-identical: {} steps, {weights}", self.steps),
            None => format!("differs after the last step: {weights}"),
            Some(Difference { step, what }) => format!("differs from step {step} on: {what}; {weights}"),
        }
    }
}

/// The first step or evaluation in which two logs differ, but for when it was and how fast.
fn first_difference(then: &[Event], now: &[Event]) -> Result<Option<Difference>> {
    let flat = |event: &Event| -> Result<Map<String, Value>> {
        let mut flat: Map<String, Value> = serde_json::from_value(serde_json::to_value(event)?)?;
        flat.retain(|key, _| !["time", "tokens_per_second"].contains(&key.as_str()));
        Ok(flat)
    };
    let computed = |events: &[Event]| -> Vec<Event> {
        let computed = events.iter().filter(|event| matches!(event, Event::Step(_) | Event::Evaluation(_)));
        computed.cloned().collect()
    };
    let (then, now) = (computed(then), computed(now));
    for i in 0..then.len().max(now.len()) {
        let pair = [then.get(i), now.get(i)].map(|event| event.map(flat).transpose());
        let [then, now] = pair;
        let (then, now) = (then?.unwrap_or_default(), now?.unwrap_or_default());
        let keys = then.keys().chain(now.keys());
        let Some(key) = keys.into_iter().find(|key| then.get(*key) != now.get(*key)) else { continue };
        let step = [&then, &now].iter().filter_map(|event| event.get("step")?.as_u64()).min().unwrap_or_default();
        let what = match (then.is_empty(), now.is_empty()) {
            (true, _) => "the run had ended before".into(),
            (_, true) => "it has ended before".into(),
            _ => {
                let value = |event: &Map<String, Value>| event.get(key).unwrap_or(&Value::Null).to_string();
                format!("{key} was {}, is {}", value(&then), value(&now))
            }
        };
        return Ok(Some(Difference { step, what }));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::Step;

    #[test]
    fn the_first_difference_is_that_of_what_was_computed() {
        let step = |step, train_loss, tokens_per_second| {
            Event::Step(Step {
                step,
                time: tokens_per_second,
                epoch: 1.0,
                train_loss,
                learning_rate: 0.1,
                grad_norm: 2.0,
                tokens_per_second,
            })
        };
        let then = [step(1, 0.5, 10.0), step(2, 0.25, 10.0)];
        let what = |now: &[Event]| first_difference(&then, now).unwrap().map(|d| (d.step, d.what));
        assert_eq!(what(&[step(1, 0.5, 99.0), step(2, 0.25, 98.0)]), None);
        let other = 0.25 + f64::EPSILON;
        let expected = Some((2, format!("train_loss was 0.25, is {other}")));
        assert_eq!(what(&[step(1, 0.5, 10.0), step(2, other, 10.0), step(3, 1.0, 1.0)]), expected);
        assert_eq!(what(&then[..1]), Some((2, "it has ended before".into())));
        let longer = [&then[..], &[step(3, 1.0, 1.0)]].concat();
        assert_eq!(what(&longer), Some((3, "the run had ended before".into())));
    }
}
