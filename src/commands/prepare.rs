//! `kiln prepare`: the data read, deduplicated, split and encoded for every model.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;

use super::{Form, check, print, print_event, print_json};
use crate::cli::{File, Options};
use crate::config::Config;
use crate::data::{self, Part, Snapshot};
use crate::hub;
use crate::store::Experiment;
use crate::train::Job;

/// Makes or finds the snapshot and the encodings, and prints what they hold.
///
/// # Errors
/// The user's, of the file and the data; files that cannot be read or written.
pub fn run(args: &File, options: &Options) -> Result<ExitCode> {
    let mut config = Config::load(args.file.as_deref(), &options.overrides())?;
    hub::fetch(&mut config, options.offline, options.quiet, hub::Scope::Whole)?;
    check::check(&config, None)?;
    let experiment = Experiment::new(&config.root, &config.name);
    let snapshot = data::prepare(&config.data, &experiment.data_dir())?;
    encode_and_print(&config, &snapshot, options, Form::Value)
}

/// Encodes the parts that a snapshot has for every model, and prints what they hold.
///
/// # Errors
/// The user's, of the models; files that cannot be read or written.
pub(super) fn encode_and_print(
    config: &Config,
    snapshot: &Snapshot,
    options: &Options,
    form: Form,
) -> Result<ExitCode> {
    let parts: Vec<Part> = Part::ALL.into_iter().filter(|part| snapshot.has(*part)).collect();

    let mut encodings = serde_json::Map::new();
    for model in &config.models {
        let job = Job { config, model, snapshot, files: None, quiet: options.quiet, profile: None, tui: false };
        let encoding = job.start(&parts)?.encoding;
        let cards = parts.iter().map(|part| Ok((part.to_string(), serde_json::to_value(encoding.card(*part)?)?)));
        encodings.insert(model.name.clone(), cards.collect::<Result<serde_json::Map<_, _>>>()?.into());
    }

    if options.json {
        let dir = snapshot.dir();
        let (hash, labels, card) = (snapshot.hash(), snapshot.labels(), snapshot.card());
        let value = json!({ "snapshot": hash, "dir": dir, "labels": labels, "card": card, "encodings": encodings });
        match form {
            Form::Value => print_json(&value)?,
            Form::Lines => print_event("prepare", None, &value)?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    print(&format!("snapshot {} in {}", snapshot.hash(), snapshot.dir().display()))?;
    for part in &parts {
        let Some(card) = snapshot.card().parts.get(part.name()) else { continue };
        let words = card.words;
        print(&format!(
            "{:<10} rows={} words: median {} p95 {} max {}",
            part.name(),
            card.rows,
            words.p50,
            words.p95,
            words.max
        ))?;
    }
    for (model, cards) in &encodings {
        for (part, card) in cards.as_object().into_iter().flatten() {
            let tokens = &card["tokens"];
            print(&format!(
                "{model} {part}: tokens median {} p95 {} max {}, truncated {} of {}",
                tokens["p50"], tokens["p95"], tokens["max"], card["truncated"], card["rows"]
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
