//! Checkpoints: all that a run needs to go on to the same bits, in a folder that appears whole.
//!
//! `checkpoints/<step>/` holds model.safetensors, optimizer.safetensors (both moments) and
//! state.json. The sampler's cursor and dropout's bits follow from the step.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::Optimizer;
use crate::pretrained::Classifier;
use crate::store;
use crate::tensors::{self, Stored, TensorFile};

/// Where a training stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub evaluations_without_gain: usize,
    /// The sum of the weighted losses since then.
    pub loss_sum: f64,
    /// The sum of their weights.
    pub loss_weight: f64,
    /// Whether early stopping has ended the training.
    pub stopped_early: bool,
}

/// The best evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its step, which has a checkpoint.
    pub step: u64,
    /// The objective's figure there.
    pub value: f64,
}

/// The checkpoints of one model.
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// Checkpoints in `folder`, of which the last `keep` and the best stay.
    pub fn new(folder: PathBuf, keep: usize) -> Self {
        Self { folder, keep }
    }

    /// The folder of a step's checkpoint.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(step.to_string())
    }

    /// The steps that have a checkpoint, ascending.
    ///
    /// # Errors
    /// What the file system says.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| self.folder.display().to_string()),
        };
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry.with_context(|| self.folder.display().to_string())?.file_name();
            steps.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes the checkpoint of `state.step`, then drops those that need not stay.
    ///
    /// # Errors
    /// What the file system says; the checkpoints before it are untouched then.
    pub fn save(&self, state: &State, classifier: &Classifier, optimizer: &Optimizer) -> Result<()> {
        let path = self.path(state.step);
        if !path.exists() {
            let staged = store::stage(&path)?;
            classifier.save_weights(&staged.path().join("model.safetensors"))?;
            let moments = [("exp_avg", &optimizer.exp_avg), ("exp_avg_sq", &optimizer.exp_avg_sq)];
            let stored = moments.map(|(name, buffer)| Stored {
                name,
                shape: vec![buffer.len()],
                buffer,
                range: 0..buffer.len(),
            });
            tensors::write(&staged.path().join("optimizer.safetensors"), stored.into())?;
            store::write_json(&staged.path().join("state.json"), state)?;
            store::publish(staged, &path)?;
        }
        let best = state.best.map(|best| best.step);
        let steps = self.steps()?;
        let old = steps.iter().rev().skip(self.keep.max(1)).filter(|&&step| Some(step) != best);
        for path in old.map(|&step| self.path(step)) {
            store::remove_dir(&path)?;
        }
        Ok(())
    }

    /// The newest checkpoint's state, with the weights and moments put where they belong.
    ///
    /// # Errors
    /// A checkpoint that cannot be read, named.
    pub fn resume(&self, classifier: &Classifier, optimizer: &mut Optimizer) -> Result<Option<State>> {
        let Some(&step) = self.steps()?.last() else { return Ok(None) };
        let path = self.path(step);
        classifier.load_weights(&path.join("model.safetensors"))?;
        load_moments(&path.join("optimizer.safetensors"), classifier, optimizer)?;
        let file = path.join("state.json");
        let state: State = store::read_json(&file)?;
        ensure!(state.step == step, "{} is of step {}, in the folder of step {step}", file.display(), state.step);
        if let Some(best) = state.best.map(|best| self.path(best.step)).filter(|best| !best.exists()) {
            bail!("{} is not there, and {} names it as the best", best.display(), file.display());
        }
        Ok(Some(state))
    }
}

fn load_moments(file: &Path, classifier: &Classifier, optimizer: &mut Optimizer) -> Result<()> {
    let mut read = || -> Result<()> {
        let tensors = TensorFile::open(file)?;
        let elements = classifier.built().parameters.elements();
        for (name, buffer) in [("exp_avg", &mut optimizer.exp_avg), ("exp_avg_sq", &mut optimizer.exp_avg_sq)] {
            let shape = &tensors.info(name)?.shape;
            ensure!(*shape == [elements], "{name} is {shape:?}, the model needs [{elements}]");
            let (mut start, mut written) = (0, Ok(()));
            tensors.read(name, |piece| {
                if written.is_ok() {
                    written = buffer.write(start, piece);
                }
                start += piece.len();
            })?;
            written?;
        }
        Ok(())
    };
    read().with_context(|| format!("{}: cannot resume from it", file.display()))
}
