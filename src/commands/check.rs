//! `kiln check`: everything about an experiment that shows without running it.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use super::{print, print_json};
use crate::cli::{File, Options};
use crate::config::{Config, Duration, Export, Format, Model, Origin, RunNum, Source, Warmup};
use crate::{store, user_error};

/// Validates the experiment and prints what it comes to; with `--json`, every value resolved.
///
/// # Errors
/// The user's: all mistakes of the file, or all that is missing on the disk.
pub fn run(args: &File, options: &Options) -> Result<ExitCode> {
    let config = Config::load(args.file.as_deref(), &options.overrides())?;
    let models = check(&config, None)?;
    if options.json {
        print_json(&config)?;
    } else if !options.quiet {
        print(&summary(&config, &models))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks that what the experiment names is there, and that kiln knows its models; returns each
/// model's `model_type`. A prepared `snapshot` stands for the data's source, which may be gone.
///
/// # Errors
/// The user's: everything that is missing, a line each.
pub fn check(config: &Config, snapshot: Option<&Path>) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    let mut exists = |what: &str, path: &Path| {
        if !path.exists() {
            missing.push(format!("{what}: {} is not there", path.display()));
        }
    };
    match (snapshot, &config.data.source) {
        (Some(snapshot), _) => exists("--data", snapshot),
        (None, Source::Sample) => {}
        (None, Source::Path(path)) => exists("data.source", path),
        (None, Source::Parts { train, validation, test }) => {
            exists("data.source.train", train);
            validation.iter().for_each(|path| exists("data.source.validation", path));
            test.iter().for_each(|path| exists("data.source.test", path));
        }
    }
    let mut model_types = Vec::new();
    for (index, model) in config.models.iter().enumerate() {
        match model_type(model, &config.root) {
            Ok(model_type) => model_types.push(model_type),
            Err(problem) => missing.push(format!("model.{index} ({}): {problem}", model.name)),
        }
    }
    match &missing[..] {
        [] => Ok(model_types),
        [one] => Err(user_error!("{one}")),
        more => Err(user_error!("{} things are not as the experiment says:\n  {}", more.len(), more.join("\n  "))),
    }
}

/// The model's `model_type`, if what it starts from is there and fits.
fn model_type(model: &Model, root: &Path) -> Result<String, String> {
    let (model_type, config) = match &model.origin {
        Origin::Scratch { architecture, config, .. } => {
            let known = (kiln_models::architecture(architecture).map_err(|error| error.to_string())?.config_keys)();
            if let Some(unknown) = config.keys().find(|key| !known.contains(key)) {
                let nearest = known.iter().max_by(|a, b| strsim::jaro(a, unknown).total_cmp(&strsim::jaro(b, unknown)));
                let nearest = nearest.map(|key| format!("; the nearest is {key:?}")).unwrap_or_default();
                return Err(format!("config has no key {unknown:?} for {architecture}{nearest}"));
            }
            if config.contains_key("vocab_size") {
                return Err("config.vocab_size: the vocabulary is the tokenizer's; set tokenizer.vocab_size".into());
            }
            (architecture.clone(), config.clone())
        }
        Origin::Folder(folder) => {
            for name in ["config.json", "model.safetensors", "tokenizer.json"] {
                if !folder.join(name).is_file() {
                    return Err(format!("{} is not there", folder.join(name).display()));
                }
            }
            let config: serde_json::Map<String, Value> =
                store::read_json(&folder.join("config.json")).map_err(|error| format!("{error:#}"))?;
            let Some(Value::String(model_type)) = config.get("model_type") else {
                return Err(format!("{} has no \"model_type\"", folder.join("config.json").display()));
            };
            (model_type.clone(), config)
        }
    };
    let architecture = kiln_models::architecture(&model_type).map_err(|error| error.to_string())?;
    let longest = (architecture.max_positions)(&config).map_err(|error| error.to_string())?;
    if model.max_length > longest {
        return Err(format!(
            "max_length = {}, but it reads at most {longest} tokens: lower max_length",
            model.max_length
        ));
    }
    if let Some(reference) = &model.train.init_from {
        store::find_model(reference, root).map_err(|error| format!("init_from: {error:#}"))?;
    }
    Ok(model_type)
}

fn summary(config: &Config, model_types: &[String]) -> String {
    let run = match config.run_num {
        RunNum::Next => "next run".into(),
        RunNum::Number(number) => format!("run {number}"),
    };
    let mut lines = vec![
        format!("experiment  {}, {run}, under {}", config.name, config.root.display()),
        format!("objective   {} {}", word(&config.objective.goal), word(&config.objective.metric)),
        format!("data        {}", data(config)),
    ];
    for (model, model_type) in config.models.iter().zip(model_types) {
        let from = match &model.origin {
            Origin::Folder(folder) => format!("from {}", folder.display()),
            Origin::Scratch { vocab_size, .. } => format!("from scratch, vocab_size {vocab_size}"),
        };
        let train = &model.train;
        let duration = match train.duration {
            Duration::Epochs(epochs) => format!("{epochs} epochs"),
            Duration::Steps(steps) => format!("{steps} steps"),
        };
        let warmup = match train.warmup {
            Warmup::Ratio(ratio) => format!("{ratio} of the steps"),
            Warmup::Steps(steps) => format!("{steps} steps"),
        };
        lines.push(format!("model       {}: {model_type} {from}, max_length {}", model.name, model.max_length));
        lines.push(format!(
            "            {duration} of batch_size {}, learning_rate {:e} {} after warm-up of {warmup}, seed {}, threads {}",
            train.batch_size,
            train.learning_rate,
            word(&train.schedule),
            train.seed,
            train.threads
        ));
    }
    let Export { opset, quantize } = config.export;
    lines.push(format!("export      opset {opset}, quantize {}", word(&quantize)));
    lines.push(format!("infer       workers {}, max_tokens {}", config.infer.workers, config.infer.max_tokens));
    lines.join("\n")
}

fn data(config: &Config) -> String {
    let data = &config.data;
    let (source, gives) = match &data.source {
        Source::Sample => ("the embedded sample".into(), [false; 2]),
        Source::Path(path) => (path.display().to_string(), [false; 2]),
        Source::Parts { train, validation, test } => {
            (format!("{} and parts", train.display()), [validation.is_some(), test.is_some()])
        }
    };
    let format = if data.format == Format::Auto { String::new() } else { format!(" ({})", word(&data.format)) };
    let share = |given, share: f64| if given { "given".into() } else { format!("{share}") };
    format!(
        "{source}{format}, validation {}, test {}, split by seed {}",
        share(gives[0], data.split.validation),
        share(gives[1], data.split.test),
        data.split.seed
    )
}

/// How the experiment file writes a value of a closed set.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}
