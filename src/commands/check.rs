//! `kiln check`: everything about an experiment that shows without running it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use kiln_models::Config as ModelConfig;
use serde::Serialize;
use serde_json::Value;

use super::{print, print_json};
use crate::cli::{File, Options};
use crate::config::{Config, Duration, Export, Format, Model, Origin, RunNum, Source, Warmup, available_memory};
use crate::data::{self, Part, Snapshot, Tokenizer};
use crate::error::warn;
use crate::store::Experiment;
use crate::train::{Largest, Memory, freeze};
use crate::{hub, pretrained, store, user_error, weights};

/// Validates the experiment and prints what it comes to; with `--json`, every value resolved. Warns
/// where a model's training needs more memory than there is.
///
/// # Errors
/// The user's: all mistakes of the file, or all that is missing on the disk.
pub fn run(args: &File, options: &Options) -> Result<ExitCode> {
    let mut config = Config::load(args.file.as_deref(), &options.overrides())?;
    hub::fetch(&mut config, options.offline, options.quiet, hub::Scope::Description)?;
    let models = check(&config, None)?;
    let snapshot = data::find(&config.data, &Experiment::new(&config.root, &config.name).data_dir())?;
    let memory = config.models.iter().zip(&models).map(|(model, config)| memory(model, config, snapshot.as_ref()));
    let memory: Vec<Memory> = memory.collect::<Result<_>>()?;
    if options.json {
        let models = config.models.iter().map(|model| model.name.as_str());
        print_json(&Checked { config: &config, memory: models.zip(&memory).collect() })?;
    } else {
        print(&summary(&config, &models, &memory))?;
    }
    for (model, memory) in config.models.iter().zip(&memory) {
        if let Some(warning) = available_memory().and_then(|available| too_much(model, memory, available)) {
            warn(format_args!("warning: {warning}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What `--json` prints.
#[derive(Serialize)]
struct Checked<'a> {
    #[serde(flatten)]
    config: &'a Config,
    /// By model.
    memory: BTreeMap<&'a str, &'a Memory>,
}

/// Checks that what the experiment names is there, and that kiln knows its models; returns the
/// config.json that each model starts from. A prepared `snapshot` stands for the data's source, which
/// may be gone.
///
/// # Errors
/// The user's: everything that is missing, a line each.
pub fn check(config: &Config, snapshot: Option<&Path>) -> Result<Vec<ModelConfig>> {
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
    let mut models = Vec::new();
    for (index, model) in config.models.iter().enumerate() {
        match model_config(model, &config.root) {
            Ok(model) => models.push(model),
            Err(problem) => missing.push(format!("model.{index} ({}): {problem}", model.name)),
        }
    }
    match &missing[..] {
        [] => Ok(models),
        [one] => Err(user_error!("{one}")),
        more => Err(user_error!("{} things are not as the experiment says:\n  {}", more.len(), more.join("\n  "))),
    }
}

/// The config.json of what the model starts from, if that is there and fits.
fn model_config(model: &Model, root: &Path) -> Result<ModelConfig, String> {
    let mut config = match &model.origin {
        Origin::Scratch { architecture, config, vocab_size } => {
            let known = (kiln_models::architecture(architecture).map_err(|error| error.to_string())?.config_keys)();
            if let Some(unknown) = config.keys().find(|key| !known.contains(key)) {
                let nearest = known.iter().max_by(|a, b| strsim::jaro(a, unknown).total_cmp(&strsim::jaro(b, unknown)));
                let nearest = nearest.map(|key| format!("; the nearest is {key:?}")).unwrap_or_default();
                return Err(format!("config has no key {unknown:?} for {architecture}{nearest}"));
            }
            if config.contains_key("vocab_size") {
                return Err("config.vocab_size: the vocabulary is the tokenizer's; set tokenizer.vocab_size".into());
            }
            if config.contains_key("pad_token_id") {
                return Err("config.pad_token_id: the padding's id is the tokenizer's; leave it out".into());
            }
            let mut config = config.clone();
            config.insert("model_type".into(), architecture.as_str().into());
            config.insert("vocab_size".into(), (*vocab_size).into());
            config
        }
        Origin::Folder(folder) => {
            for name in ["config.json", "tokenizer.json"] {
                if !folder.join(name).is_file() {
                    return Err(format!("{} is not there", folder.join(name).display()));
                }
            }
            weights::files(folder).map_err(|error| format!("{error:#}"))?;
            read_config(folder)?
        }
        Origin::Hub { folder, .. } => read_config(folder)?,
    };
    let says = |error: kiln_models::Error| match &model.origin {
        Origin::Scratch { .. } => error.to_string(),
        Origin::Folder(folder) | Origin::Hub { folder, .. } => format!("{}: {error}", folder.display()),
    };
    let architecture = kiln_models::architecture(model_type(&config)).map_err(says)?;
    let longest = (architecture.max_positions)(&config).map_err(says)?;
    if model.max_length > longest {
        return Err(format!(
            "max_length = {}, but it reads at most {longest} tokens: lower max_length",
            model.max_length
        ));
    }
    if let Some(reference) = &model.train.init_from {
        let folder = store::find_model(reference, root).map_err(|error| format!("init_from: {error:#}"))?;
        config = read_config(&folder)?;
    }
    Ok(config)
}

fn read_config(folder: &Path) -> Result<ModelConfig, String> {
    let file = folder.join("config.json");
    let config: ModelConfig = store::read_json(&file).map_err(|error| format!("{error:#}"))?;
    if model_type(&config).is_empty() {
        return Err(format!("{} has no \"model_type\"", file.display()));
    }
    Ok(config)
}

fn model_type(config: &ModelConfig) -> &str {
    config.get("model_type").and_then(Value::as_str).unwrap_or_default()
}

/// What the model's training will need, by the lengths of the data where they are known.
fn memory(model: &Model, config: &ModelConfig, snapshot: Option<&Snapshot>) -> Result<Memory> {
    let mut config = config.clone();
    let tokenizer = match (&model.train.init_from, &model.origin, snapshot) {
        (None, Origin::Folder(folder) | Origin::Hub { folder, .. }, Some(_)) => Some(folder.clone()),
        (None, Origin::Scratch { architecture, vocab_size, .. }, Some(snapshot)) => {
            Some(snapshot.scratch_tokenizer_dir(pretrained::architecture(architecture)?.tokenizer, *vocab_size))
        }
        _ => None,
    };
    let tokenizer =
        tokenizer.filter(|folder| folder.exists()).map(|folder| Tokenizer::from_folder(&folder)).transpose()?;
    if let (Some(tokenizer), Origin::Scratch { .. }) = (&tokenizer, &model.origin) {
        config.insert("vocab_size".into(), tokenizer.vocab_size().into());
    }
    let labels = snapshot.map_or_else(|| ["a", "b"].map(String::from).to_vec(), |snapshot| snapshot.labels().to_vec());
    let built = pretrained::declare(&config, &labels, model.train.dropout)?;
    freeze(&built.parameters, &model.train)?;

    let parts = [Part::Train, Part::Validation];
    let encoding = match (snapshot, tokenizer) {
        (Some(snapshot), Some(tokenizer)) => {
            snapshot.find_encoding(&tokenizer, model.max_length, built.architecture.inputs, &parts)?
        }
        _ => None,
    };
    let largest = match encoding {
        Some(encoding) => {
            Largest::of(&encoding.dataset(Part::Train)?, &encoding.dataset(Part::Validation)?, &model.train)
        }
        None => Largest::assumed(model.max_length, &model.train),
    };
    Memory::plan(&built, &model.train, &largest).with_context(|| format!("model {:?}", model.name))
}

/// What to say where a training needs more than there is.
fn too_much(model: &Model, memory: &Memory, available: u64) -> Option<String> {
    (memory.peak_bytes > available).then(|| {
        let fix = if model.train.recompute { "" } else { " or set train.recompute = true" };
        format!(
            "{}: training needs about {} GB, but there are {} GB for this process: lower train.micro_batch_tokens \
             (now {}){fix}",
            model.name,
            gigabytes(memory.peak_bytes),
            gigabytes(available),
            model.train.micro_batch_tokens
        )
    })
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1e9)
}

fn summary(config: &Config, configs: &[ModelConfig], memory: &[Memory]) -> String {
    let run = match config.run_num {
        RunNum::Next => "next run".into(),
        RunNum::Number(number) => format!("run {number}"),
    };
    let mut lines = vec![
        format!("experiment  {}, {run}, under {}", config.name, config.root.display()),
        format!("objective   {} {}", word(&config.objective.goal), word(&config.objective.metric)),
        format!("data        {}", data(config)),
    ];
    for ((model, config), memory) in config.models.iter().zip(configs).zip(memory) {
        let from = match &model.origin {
            Origin::Folder(folder) => format!("from {}", folder.display()),
            Origin::Hub { repository, revision, .. } => format!("from hf:{repository}@{revision}"),
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
        lines.push(format!(
            "model       {}: {} {from}, max_length {}",
            model.name,
            model_type(config),
            model.max_length
        ));
        lines.push(format!(
            "            {duration} of batch_size {}, learning_rate {:e} {} after warm-up of {warmup}, seed {}, threads {}",
            train.batch_size,
            train.learning_rate,
            word(&train.schedule),
            train.seed,
            train.threads
        ));
        lines.push(format!("            {}", line(model, memory)));
    }
    let Export { opset, quantize } = config.export;
    lines.push(format!("export      opset {opset}, quantize {}", word(&quantize)));
    lines.push(format!("infer       workers {}, max_tokens {}", config.infer.workers, config.infer.max_tokens));
    lines.join("\n")
}

/// `minilm: a training step needs about 1.23 GB (…), 4096 tokens at once`
fn line(model: &Model, memory: &Memory) -> String {
    let Memory { peak_bytes, parameter_bytes, step_bytes, evaluation_bytes, rest_bytes, tokens, from_data } = *memory;
    let (what, activations) = match step_bytes >= evaluation_bytes {
        true => ("a training step", format!("activations {}", gigabytes(step_bytes))),
        false => ("an evaluation", format!("activations {}", gigabytes(evaluation_bytes))),
    };
    format!(
        "{}: {what} needs about {} GB (weights, gradients and moments {}, {activations}, the rest {}), {tokens} tokens \
         at once{}{}",
        model.name,
        gigabytes(peak_bytes),
        gigabytes(parameter_bytes),
        gigabytes(rest_bytes),
        if model.train.recompute { ", with recompute" } else { "" },
        if from_data { "" } else { " if texts fill max_length; after kiln prepare, by their own lengths" },
    )
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;

    #[test]
    fn too_little_memory_is_said_with_the_fix() {
        let warning = |sets: &[&str], available| {
            let sets = sets.iter().map(|set| (*set).to_owned()).collect();
            let config = Config::load(None, &Overrides { sets, ..Overrides::default() }).unwrap();
            let model = &config.models[0];
            let memory = memory(model, &model_config(model, &config.root).unwrap(), None).unwrap();
            too_much(model, &Memory { peak_bytes: 2_500_000_000, ..memory }, available)
        };
        assert_eq!(warning(&[], 2_500_000_000), None);
        assert_eq!(
            warning(&[], 1_990_000_000).unwrap(),
            "small-bert: training needs about 2.50 GB, but there are 1.99 GB for this process: lower \
             train.micro_batch_tokens (now 4096) or set train.recompute = true"
        );
        let recomputed = warning(&["train.recompute=true"], 1_000_000_000).unwrap();
        assert!(recomputed.ends_with("lower train.micro_batch_tokens (now 4096)"), "{recomputed}");
    }
}
