//! lock.json: everything that decides what a run's models are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::find_model;
use crate::config::{Config, Model, Origin, hex};

/// What a run was made from, to make it again or to say why it cannot go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pins {
    /// kiln's version.
    pub kiln: String,
    /// [`Config::hash`].
    pub config_hash: String,
    /// The data's snapshot.
    pub snapshot: String,
    /// SHA-256 of what each model starts from (weights, config.json, tokenizer.json), by model, then by
    /// file; none from scratch.
    pub base: BTreeMap<String, BTreeMap<String, String>>,
    /// The commit of each model that starts from the Hub.
    #[serde(default)] // runs from before there was this key
    pub hub: BTreeMap<String, String>,
    /// SHA-256 of the program.
    #[serde(default)] // as above
    pub binary: String,
    /// CPU threads by model: with as many, a run is the same to the last bit.
    pub threads: BTreeMap<String, usize>,
    /// The CPU's architecture and the extensions that kernels choose by.
    pub cpu_features: Vec<String>,
    /// The `--set`s that were laid over the experiment file.
    pub sets: Vec<String>,
    /// The configuration, resolved.
    pub config: Config,
}

impl Pins {
    /// Pins what `config` and the data's `snapshot` are now; reads the base weights.
    ///
    /// # Errors
    /// The weights cannot be read.
    pub fn new(config: &Config, snapshot: &str) -> Result<Self> {
        let mut base = BTreeMap::new();
        for model in &config.models {
            let folder = match (&model.train.init_from, &model.origin) {
                (Some(reference), _) => find_model(reference, &config.root)?,
                (None, Origin::Folder(folder) | Origin::Hub { folder, .. }) => folder.clone(),
                (None, Origin::Scratch { .. }) => continue,
            };
            let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
            let mut files = BTreeMap::new();
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let weights = [".safetensors", ".bin", ".index.json"].iter().any(|end| name.ends_with(end));
                if weights || name == "config.json" || name == "tokenizer.json" {
                    files.insert(name, sha256_file(&entry.path())?);
                }
            }
            base.insert(model.name.clone(), files);
        }
        let commit = |model: &Model| match &model.origin {
            Origin::Hub { folder, .. } => {
                Some((model.name.clone(), folder.file_name()?.to_string_lossy().into_owned()))
            }
            _ => None,
        };
        Ok(Self {
            kiln: env!("CARGO_PKG_VERSION").into(),
            config_hash: config.hash(),
            snapshot: snapshot.into(),
            base,
            hub: config.models.iter().filter_map(commit).collect(),
            binary: sha256_file(&std::env::current_exe().context("looking for kiln itself")?)?,
            threads: config.models.iter().map(|model| (model.name.clone(), model.train.threads)).collect(),
            cpu_features: cpu_features(),
            sets: config.sets.clone(),
            config: config.clone(),
        })
    }

    /// The files that models start from and that are others now, as `model/file`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn changed_base(&self, config: &Config, snapshot: &str) -> Result<Vec<String>> {
        let now = Self::new(config, snapshot)?.base;
        let names = |base: &BTreeMap<String, BTreeMap<String, String>>| {
            let files =
                base.iter().flat_map(|(model, files)| files.iter().map(move |(file, hash)| (model, file, hash)));
            files.map(|(model, file, hash)| (format!("{model}/{file}"), hash.clone())).collect::<BTreeSet<_>>()
        };
        let changed: BTreeSet<String> =
            names(&self.base).symmetric_difference(&names(&now)).map(|(name, _)| name.clone()).collect();
        Ok(changed.into_iter().collect())
    }

    /// In what the program and the CPU of `now` are others, as `what: then, now`.
    pub fn other_machine(&self, now: &Self) -> Vec<String> {
        let features = |pins: &Self| pins.cpu_features.join(" ");
        let all = [
            ("kiln", self.kiln.clone(), now.kiln.clone()),
            ("its binary", self.binary.clone(), now.binary.clone()),
            ("the CPU", features(self), features(now)),
        ];
        let other = all.into_iter().filter(|(_, then, now)| then != now);
        other.map(|(what, then, now)| format!("{what}: {then} then, {now} now")).collect()
    }

    /// What keeps `config` on `snapshot` from going on with this run, as `key: then, now`; empty
    /// where nothing does.
    pub(super) fn differences(&self, config: &Config, snapshot: &str) -> Vec<String> {
        let mut differences = Vec::new();
        if self.config_hash != config.hash() {
            let pair = |config: &Config| serde_json::to_value(config.decisive()).unwrap_or_default();
            differ("", &pair(&self.config), &pair(config), &mut differences);
            if differences.is_empty() {
                differences.push("the configuration".into());
            }
        }
        if self.snapshot != snapshot {
            differences.push(format!("the data: snapshot {} then, {snapshot} now", self.snapshot));
        }
        differences
    }
}

/// Adds the leaves in which two JSON values differ.
fn differ(path: &str, then: &Value, now: &Value, out: &mut Vec<String>) {
    let join = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (then, now) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                differ(&join(key), a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), out);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                differ(&join(&index.to_string()), a, b, out);
            }
        }
        _ if then != now => out.push(format!("{path}: {then} then, {now} now")),
        _ => {}
    }
}

/// SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// The file cannot be read.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut hash = || -> io::Result<()> {
        let mut file = File::open(path)?;
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                read => hasher.update(&buffer[..read]),
            }
        }
    };
    hash().with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(&hasher.finalize()))
}

fn cpu_features() -> Vec<String> {
    let mut features = vec![std::env::consts::ARCH.to_owned()];
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ];
        features.extend(found.iter().filter(|(_, has)| *has).map(|(name, _)| (*name).to_owned()));
    }
    features
}
