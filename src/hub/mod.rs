//! Checkpoints of the Hugging Face Hub: `hf:org/name@revision`, kept in the cache that Python's
//! `huggingface_hub` keeps, and taken from there where they are.
//!
//! What is fetched is what a fine-tuning reads: config.json, the tokenizer's files, the weights. Every file is
//! checked against the size and the hash that the Hub names; a download that breaks goes on where it stopped,
//! in this process or a later one, kiln's or Python's.

mod cache;
mod client;
#[cfg(test)]
mod tests;

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::config::{Config, Origin};
use crate::error::warn;
use crate::user_error;
use crate::weights::{self, Index, WEIGHTS};
use cache::Repository;
use client::Client;

/// What is fetched beside the weights, and whether a checkpoint has to have it.
const BESIDE: [(&str, bool); 4] = [
    ("config.json", true),
    ("tokenizer.json", true),
    ("tokenizer_config.json", false),
    ("special_tokens_map.json", false),
];

/// The Hub, and the cache of what came from it.
pub struct Hub {
    /// huggingface_hub's cache: a folder for each repository.
    cache: PathBuf,
    /// None offline.
    client: Option<Client>,
}

/// What the Hub says of a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// How much is fetched of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// What says what it is, and its tokenizer.
    Description,
    /// That, and the weights.
    Whole,
}

/// Fetches what the models of `config` start from, where it is on the Hub, and notes where it lies. `offline`
/// takes it from the cache.
///
/// # Errors
/// As [`Hub::from_env`] and [`Hub::folder`].
pub fn fetch(config: &mut Config, offline: bool, quiet: bool, scope: Scope) -> Result<()> {
    let mut hub = None;
    for model in &mut config.models {
        if let Origin::Hub { repository, revision, folder } = &mut model.origin {
            let hub = match &hub {
                Some(hub) => hub,
                None => hub.insert(Hub::from_env(offline, quiet)?),
            };
            *folder = hub.folder(repository, revision, scope).with_context(|| format!("model {:?}", model.name))?;
        }
    }
    Ok(())
}

impl Hub {
    /// As the environment says: HF_HOME or HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN or the file that a login
    /// wrote, HF_HUB_OFFLINE. `offline` forbids the network too.
    ///
    /// # Errors
    /// The user's: none of the variables names a place for the cache.
    pub fn from_env(offline: bool, quiet: bool) -> Result<Self> {
        let var = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let home = var("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(var("XDG_CACHE_HOME")?).join("huggingface")))
            .or_else(|| Some(PathBuf::from(var("HOME")?).join(".cache/huggingface")))
            .ok_or_else(|| user_error!("no place for the Hub's files: set HF_HOME to a folder for them"))?;
        let cache = var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let is_true = |value: String| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        if offline || var("HF_HUB_OFFLINE").is_some_and(is_true) {
            return Ok(Self { cache, client: None });
        }
        let file = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = var("HF_TOKEN").or_else(|| std::fs::read_to_string(file).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| client::ENDPOINT.into());
        Ok(Self { cache, client: Some(Client::new(&endpoint, token, quiet, Duration::from_millis(500))) })
    }

    /// The folder of a revision in the cache, fetched where it is not there whole. A branch is looked up
    /// anew; where the Hub cannot be reached, what was fetched before is taken, which is said.
    ///
    /// # Errors
    /// The user's: a repository that is not there or not open to the token, or one that lacks what a
    /// fine-tuning needs; offline, one that is not in the cache. Else the Hub's or the file system's.
    pub fn folder(&self, repository: &str, revision: &str, scope: Scope) -> Result<PathBuf> {
        let name = format!("hf:{repository}@{revision}");
        let place = Repository::new(&self.cache, repository);
        let known =
            place.commit(revision).map(|commit| place.snapshot(&commit)).filter(|folder| is_there(folder, scope));
        let Some(client) = &self.client else {
            return known.ok_or_else(|| {
                user_error!(
                    "{name} is not in {}, and nothing is fetched offline; run once without --offline and \
                     HF_HUB_OFFLINE",
                    self.cache.display()
                )
            });
        };
        if let Some(folder) = known.as_ref().filter(|_| cache::is_commit(revision)) {
            return Ok(folder.clone()); // what a commit is never changes
        }
        let listing: Listing = match (client.listing(repository, revision), known) {
            (Err(error), Some(folder)) if error.is::<client::Unreachable>() => {
                warn(format_args!(
                    "warning: {error:#}; {name} is taken as it was fetched before, {}",
                    folder.display()
                ));
                return Ok(folder);
            }
            (listing, _) => listing?,
        };
        if !cache::is_commit(&listing.sha) {
            anyhow::bail!("the Hub says that {name} is commit {:?}, which is none", listing.sha);
        }
        place.name(revision, &listing.sha)?;
        let there: Vec<&str> = listing.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
        let fetch = |file: &str| place.fetch(client, &listing.sha, file);
        for (file, needed) in BESIDE {
            if there.contains(&file) {
                fetch(file)?;
            } else if needed {
                return Err(user_error!(
                    "{name} has no {file}; it needs to be a transformers checkpoint with a fast tokenizer"
                ));
            }
        }
        if scope == Scope::Description {
            return Ok(place.snapshot(&listing.sha));
        }
        let Some(weights) = WEIGHTS.into_iter().find(|file| there.contains(file)) else {
            return Err(user_error!("{name} has none of {}", WEIGHTS.join(", ")));
        };
        let file = fetch(weights)?;
        if weights.ends_with(".index.json") {
            for shard in Index::read(&file)?.files() {
                fetch(shard)?;
            }
        }
        Ok(place.snapshot(&listing.sha))
    }
}

/// Whether a folder has what is fetched of a checkpoint.
fn is_there(folder: &Path, scope: Scope) -> bool {
    let beside = BESIDE.iter().all(|(file, needed)| !needed || folder.join(file).is_file());
    beside && (scope == Scope::Description || weights::files(folder).is_ok())
}
