//! Reading a config.json: what all architectures ask of it.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};

use crate::{Error, Result};

/// A parsed `config.json`.
pub type Config = Map<String, Json>;

/// The number of labels that `config` gives: of `id2label`, else `num_labels`, else 2.
///
/// # Errors
/// An `id2label` that is not a table.
pub fn num_labels(config: &Config) -> Result<usize> {
    match (config.get("id2label"), config.get("num_labels")) {
        (Some(Json::Object(labels)), _) => Ok(labels.len()),
        (Some(other), _) if !other.is_null() => {
            Err(Error::Config(format!("id2label = {other}: needs to be a table of id to label")))
        }
        (_, Some(n)) => n
            .as_u64()
            .map(|n| n as usize)
            .ok_or_else(|| Error::Config(format!("num_labels = {n}: needs to be a whole number"))),
        _ => Ok(2),
    }
}

/// The keys that a config struct reads, from its defaults.
pub(crate) fn keys(defaults: &impl Serialize) -> Vec<String> {
    match serde_json::to_value(defaults) {
        Ok(Json::Object(keys)) => keys.into_iter().map(|(key, _)| key).collect(),
        _ => Vec::new(),
    }
}

/// What a struct reads of `config`, and its defaults where that has no such key. Other keys are left alone.
pub(crate) fn parse<C: Default + Serialize + DeserializeOwned>(config: &Config) -> Result<C> {
    let Ok(Json::Object(defaults)) = serde_json::to_value(C::default()) else {
        return Err(Error::Config("its defaults are no table".into()));
    };
    let mut read = defaults.clone();
    for (key, value) in config.iter().filter(|(key, _)| defaults.contains_key(*key)) {
        let mut alone = defaults.clone();
        alone.insert(key.clone(), value.clone());
        serde_json::from_value::<C>(Json::Object(alone)).map_err(|e| Error::Config(format!("{key} = {value}: {e}")))?;
        read.insert(key.clone(), value.clone());
    }
    serde_json::from_value(Json::Object(read)).map_err(|e| Error::Config(e.to_string()))
}

/// Refuses sizes of 0, and those that no model has: with them products of sizes stay within 64 bits.
pub(crate) fn sizes(sizes: &[(&str, usize)]) -> Result<()> {
    for (key, size) in sizes {
        let most = if key.ends_with("layers") { 10_000 } else { 1 << 22 };
        match size {
            0 => return Err(Error::Config(format!("{key} = 0: needs at least 1"))),
            _ if *size > most => return Err(Error::Config(format!("{key} = {size}: needs at most {most}"))),
            _ => {}
        }
    }
    Ok(())
}

/// Refuses what is below 0, or no number.
pub(crate) fn not_negative(numbers: &[(&str, f64)]) -> Result<()> {
    match numbers.iter().find(|(_, number)| !(0.0..f64::INFINITY).contains(number)) {
        Some((key, number)) => Err(Error::Config(format!("{key} = {number}: needs to be 0 or more"))),
        None => Ok(()),
    }
}

/// Refuses a size that heads do not divide.
pub(crate) fn heads_divide((size_key, size): (&str, usize), (heads_key, heads): (&str, usize)) -> Result<()> {
    if heads == 0 || !size.is_multiple_of(heads) {
        return Err(Error::Config(format!("{size_key} = {size} is no multiple of {heads_key} = {heads}")));
    }
    Ok(())
}

/// Refuses what is no dropout.
pub(crate) fn probabilities(dropouts: &[(&str, f32)]) -> Result<()> {
    match dropouts.iter().find(|(_, p)| !(0.0..1.0).contains(p)) {
        Some((key, p)) => Err(Error::Config(format!("{key} = {p}: needs to be in [0, 1)"))),
        None => Ok(()),
    }
}

/// Refuses any other value than the one that the model is written for.
pub(crate) fn supported<T: PartialEq + Debug>(key: &str, got: T, only: T) -> Result<()> {
    if got == only { Ok(()) } else { Err(Error::Config(format!("{key} = {got:?} is not supported; {only:?} is"))) }
}
