//! `kiln infer`: a run's ONNX models on the test part, or on rows without labels.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde_json::Map;

use super::export::{Target, by_model};
use super::{Form, print, print_json};
use crate::cli::{self, Options};
use crate::config::{self, Data, Format, Quantize};
use crate::data::read_rows;
use crate::export::{certify_quantized_test, certify_test};
use crate::infer::{Exported, Setting, predict_rows, runtime, test_model, test_quantized};
use crate::{report, user_error};

/// Tests the run's models, or predicts `--input` with one of them.
///
/// # Errors
/// The user's, where there is no such run, model or export; what [`test_model`] and [`predict_rows`] say.
pub fn run(args: &cli::Infer, options: &Options) -> Result<ExitCode> {
    let target = Target::find(&args.target, options)?;
    if let (Some(input), Some(output)) = (&args.input, &args.output) {
        let quantize = if args.int8 { Quantize::Int8 } else { Quantize::None };
        return predict(&target, quantize, input, (output, args.calibrated), options);
    }
    let _held = target.run.hold()?;
    let snapshot = target.snapshot()?;
    let setting = target.setting(&snapshot, options)?;
    test_and_print(&setting, &target.models, args.calibrated, options, Form::Value)?;
    Ok(ExitCode::SUCCESS)
}

/// Tests models, certifies what each said where its weights lie beside, and prints their tables; where
/// a quantised model lies beside too, tests it and holds it against the first.
///
/// # Errors
/// What [`test_model`], [`certify_test`] and [`certify_quantized_test`] say.
pub(super) fn test_and_print(
    setting: &Setting<'_>,
    models: &[config::Model],
    calibrated: bool,
    options: &Options,
    form: Form,
) -> Result<()> {
    let mut all = Map::new();
    for model in models {
        let tested = test_model(setting, model, calibrated)?;
        certify_test(setting, model, &tested)?;
        if !options.json {
            let name = if models.len() > 1 { format!("{}\n", model.name) } else { String::new() };
            print(format!("{name}{}", report::table(&tested.statistics)).trim_end())?;
        }
        let mut statistics = serde_json::to_value(&tested.statistics)?;
        if let Some(quantized) = test_quantized(setting, model, &tested)? {
            let agreement = certify_quantized_test(setting, model, &tested, &quantized)?;
            if options.json {
                statistics["int8"] = serde_json::to_value(quantized.statistics)?;
            } else {
                let rate = quantized.statistics.throughput.map_or(0.0, |throughput| throughput.examples_per_second);
                let line = super::export::int8_line(&model.name, &agreement);
                print(&format!("{line} examples_per_second={rate:.1}"))?;
            }
        }
        if options.json && form == Form::Lines {
            super::print_event("test", Some(&model.name), &statistics)?;
        }
        all.insert(model.name.clone(), statistics);
    }
    if options.json && form == Form::Value {
        print_json(&by_model(all))?;
    }
    Ok(())
}

fn predict(
    target: &Target,
    quantize: Quantize,
    input: &Path,
    (output, calibrated): (&Path, bool),
    options: &Options,
) -> Result<ExitCode> {
    let [model] = target.models.as_slice() else {
        let names: Vec<_> = target.models.iter().map(|model| model.name.as_str()).collect();
        return Err(user_error!("--input takes one model, and the run has {}: choose by --model", names.join(", ")));
    };
    // Columns are the run's; a file's form is its own.
    let rows = read_rows(input, &Data { format: Format::Auto, ..target.config.data.clone() })?;
    let files = target.run.model(&model.name);
    let exported = Exported::open(runtime::ensure(options.offline)?, &files, model, quantize, target.config.infer)?;
    let throughput = predict_rows(&exported, &rows, output, calibrated, options.quiet)?;
    if options.json {
        print_json(&throughput)?;
    } else {
        let rate = throughput.examples_per_second;
        print(&format!("model={} examples={} examples_per_second={rate:.1}", model.name, rows.len()))?;
    }
    Ok(ExitCode::SUCCESS)
}
