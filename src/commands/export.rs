//! `kiln export`: a run's trained models to ONNX, each with its certificate.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Map, Value};

use super::{print, print_json};
use crate::cli::{self, Options};
use crate::config::{self, Config, Quantize};
use crate::data::Snapshot;
use crate::export::{Agreement, Certificate, export_model, quantize_model};
use crate::infer::{Setting, runtime};
use crate::store::{self, JobType, Pins, RunDir};
use crate::user_error;

/// Exports the models from the run's `model/` folders again.
///
/// # Errors
/// The user's, where there is no such run or model; what [`export_model`] and [`quantize_model`] say.
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
        let mut certificate = serde_json::to_value(certificate)?;
        if target.config.export.quantize == Quantize::Int8 {
            let agreement = quantize_model(&setting, model)?;
            if !options.json {
                print(&int8_line(&model.name, &agreement))?;
            }
            certificate["int8"] = serde_json::to_value(agreement)?;
        }
        certificates.insert(model.name.clone(), certificate);
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

/// A quantised model's certificate in one line.
pub(super) fn int8_line(model: &str, agreement: &Agreement) -> String {
    let Agreement { examples, agreement, max_abs_diff, f1_fp32, f1_int8, bytes_fp32, bytes_int8, .. } = agreement;
    let megabytes = |bytes: &u64| *bytes as f64 / 1e6;
    format!(
        "model={model} int8 examples={examples} agreement={agreement:.4} max_abs_diff={max_abs_diff:.2} \
         f1_fp32={f1_fp32:.4} f1_int8={f1_int8:.4} megabytes_fp32={:.1} megabytes_int8={:.1}",
        megabytes(bytes_fp32),
        megabytes(bytes_int8)
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
        let record = run.record()?;
        if record.job_type == JobType::Comparison {
            let (run, models) = (run.reference(), record.models.join(", "));
            return Err(user_error!("{run} is a comparison, without models of its own: it compares {models}"));
        }
        let Pins { mut config, mut sets, .. } = run.pins()?;
        // How models are run, and whether a quantised one is made, may be another machine's choice, and
        // another day's: --set and --threads count, and "auto" is this machine's.
        let mut overrides = options.overrides();
        sets.append(&mut overrides.sets);
        overrides.sets = sets;
        let now = Config::load(Some(&run.dir().join("experiment.toml")), &overrides)?;
        config.infer = now.infer;
        config.export.quantize = now.export.quantize;
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
