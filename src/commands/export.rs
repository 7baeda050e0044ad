//! `kiln export`: a run's trained models to ONNX, each with its certificate.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Map, Value};

use super::{print, print_json};
use crate::cli::{self, Options};
use crate::config::{self, Config};
use crate::data::Snapshot;
use crate::export::{Certificate, export_model};
use crate::infer::{Setting, runtime};
use crate::store::{self, Pins, RunDir};
use crate::user_error;

/// Exports the models from the run's `model/` folders again.
///
/// # Errors
/// The user's, where there is no such run or model; what [`export_model`] says.
pub fn run(args: &cli::Export, options: &Options) -> Result<ExitCode> {
    let target = Target::find(args, options)?;
    let _held = target.run.hold()?;
    let snapshot = target.snapshot()?;
    let setting = target.setting(&snapshot, options)?;
    let mut certificates = Map::new();
    for model in &target.models {
        let certificate = export_model(&setting, model)?;
        if !options.json {
            print(&line(&model.name, &certificate))?;
        }
        certificates.insert(model.name.clone(), serde_json::to_value(certificate)?);
    }
    if options.json {
        print_json(&by_model(certificates))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A certificate in one line.
pub(super) fn line(model: &str, certificate: &Certificate) -> String {
    let Certificate { examples, max_abs_diff, argmax_flips, f1_trained, f1_onnx, .. } = certificate;
    format!(
        "model={model} examples={examples} max_abs_diff={max_abs_diff:.1e} argmax_flips={argmax_flips} \
         f1_trained={f1_trained:.4} f1_onnx={f1_onnx:.4}"
    )
}

/// A run that is there, and those of its models that were asked for.
pub(super) struct Target {
    /// The run.
    pub run: RunDir,
    /// What it was trained with, but threads and workers are this machine's.
    pub config: Config,
    /// The models, in the configuration's order.
    pub models: Vec<config::Model>,
}

impl Target {
    pub(super) fn find(args: &cli::Export, options: &Options) -> Result<Target> {
        let run = store::find(args.run.as_deref(), &options.root())?;
        let Pins { mut config, mut sets, .. } = run.pins()?;
        // How models are run may be another machine's choice, and another day's: --set and --threads
        // count, and "auto" is this machine's.
        let mut overrides = options.overrides();
        sets.append(&mut overrides.sets);
        overrides.sets = sets;
        config.infer = Config::load(Some(&run.dir().join("experiment.toml")), &overrides)?.infer;
        kiln_kernels::threads::set(config.infer.workers)?;
        for model in &mut config.models {
            model.train.threads = config.infer.workers;
        }
        let mut models = config.models.clone();
        if let Some(name) = &args.model {
            models.retain(|model| model.name == *name);
            if models.is_empty() {
                let names: Vec<_> = config.models.iter().map(|model| model.name.as_str()).collect();
                return Err(user_error!("run {} has no model {name:?}; it has {}", run.reference(), names.join(", ")));
            }
        }
        Ok(Target { run, config, models })
    }

    /// The run's data.
    pub(super) fn snapshot(&self) -> Result<Snapshot> {
        Snapshot::open(&self.run.snapshot_dir()?)
    }

    /// What exporting and testing take.
    pub(super) fn setting<'a>(&'a self, snapshot: &'a Snapshot, options: &Options) -> Result<Setting<'a>> {
        let runtime = runtime::ensure(options.offline)?;
        options.note(|| format!("ONNX Runtime: {}", runtime.library().display()));
        Ok(Setting { runtime, run: &self.run, config: &self.config, snapshot, quiet: options.quiet })
    }
}

/// One model's JSON as it is, several models' by name.
pub(super) fn by_model(mut models: Map<String, Value>) -> Value {
    match models.len() {
        1 => models.values_mut().next().map_or(Value::Null, Value::take),
        _ => models.into(),
    }
}
