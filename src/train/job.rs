//! One model's way from its origin to a folder that transformers loads.

use std::ops::Range;
use std::time::Instant;

use anyhow::{Context, Result};
use kiln_models::nn::LoadReport;

use super::{Checkpoints, Outcome, Output, Profile, Signals, Trainer, logits, place};
use crate::allocator::KeptPages;
use crate::config::{self, Config, Origin};
use crate::data::{Dataset, Encoding, Part, Snapshot, Tokenizer};
use crate::dist::Communicator;
use crate::metrics::{Temperature, judge};
use crate::pretrained::{self, Classifier};
use crate::progress::Progress;
use crate::store::{self, ModelDir};
use crate::track::{Evaluation, Tracking};
use crate::{report, user_error};

/// What one model's training reads and where it writes.
pub struct Job<'a> {
    /// The experiment.
    pub config: &'a Config,
    /// The model.
    pub model: &'a config::Model,
    /// The rows.
    pub snapshot: &'a Snapshot,
    /// The model's folder in the run, and who hears of its training: the main process has them.
    pub files: Option<(&'a ModelDir, &'a Tracking<'a>)>,
    /// No progress on stderr.
    pub quiet: bool,
    /// The steps, from 0 at this start, of which the main process writes trace.json.
    pub profile: Option<Range<u64>>,
    /// Progress on the whole terminal.
    pub tui: bool,
}

/// A model ready to train: its weights, its tokenizer, its encoded rows.
pub struct Start {
    /// The weights.
    pub classifier: Classifier,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The rows, encoded.
    pub encoding: Encoding,
}

impl Job<'_> {
    /// Loads or makes the model and its tokenizer, and encodes `parts`, or finds them encoded.
    ///
    /// # Errors
    /// A folder that is no model, or a `max_length` that the model cannot read.
    pub fn start(&self, parts: &[Part]) -> Result<Start> {
        let (labels, train) = (self.snapshot.labels(), &self.model.train);
        let earlier =
            train.init_from.as_ref().map(|reference| store::find_model(reference, &self.config.root)).transpose()?;
        let (classifier, tokenizer) = match (&earlier, &self.model.origin) {
            (Some(folder), _) | (None, Origin::Folder(folder) | Origin::Hub { folder, .. }) => {
                let (classifier, report) = Classifier::pretrained(folder, labels, train.dropout, train.seed)?;
                self.say(&format!("{}: {}", folder.display(), describe(&report)));
                (classifier, Tokenizer::from_folder(folder)?)
            }
            (None, Origin::Scratch { architecture, config, vocab_size }) => {
                let kind = pretrained::architecture(architecture)?.tokenizer;
                let tokenizer = self.snapshot.scratch_tokenizer(kind, *vocab_size)?;
                let (vocab_size, pad_id) = (tokenizer.vocab_size(), tokenizer.pad_id());
                let classifier =
                    Classifier::scratch(architecture, config, vocab_size, pad_id, labels, train.dropout, train.seed)
                        .with_context(|| format!("model {:?}", self.model.name))?;
                let elements = classifier.built().parameters.elements();
                let tokenizer = tokenizer.of(classifier.built().architecture, classifier.max_positions()?)?;
                self.say(&format!("a new {architecture} of {elements} parameters, a new vocabulary of {vocab_size}"));
                (classifier, tokenizer)
            }
        };
        let (max_length, max_positions) = (self.model.max_length, classifier.max_positions()?);
        if max_length > max_positions {
            return Err(user_error!(
                "max_length = {max_length}, but model {:?} reads at most {max_positions} tokens; lower max_length",
                self.model.name
            ));
        }
        let encoding = self.snapshot.encode(&tokenizer, max_length, classifier.input_names(), parts, train.threads)?;
        Ok(Start { classifier, tokenizer, encoding })
    }

    /// Trains with all `ranks` to the end or to a signal; at the end `model/`, statistics.json and
    /// curves.png stand.
    ///
    /// # Errors
    /// What loading, encoding and training say, or a rank that is lost.
    pub fn train(
        &self,
        ranks: &Communicator,
        signals: &Signals,
        print: impl Fn(&Evaluation) -> Result<()>,
    ) -> Result<Outcome> {
        let _kept = KeptPages::new();
        let settings = &self.model.train;
        kiln_kernels::threads::set(settings.threads)?;
        let start = ranks.in_turn(|| self.start(&[Part::Train, Part::Validation]))?;
        let Start { classifier, tokenizer, encoding } = start;
        place(&classifier.built().parameters, settings, ranks.local_rank())?;
        let (train, validation) = (encoding.dataset(Part::Train)?, encoding.dataset(Part::Validation)?);
        self.check_ids(&classifier, &[&train, &validation])?;

        let checkpoints = |files: &ModelDir| Checkpoints::new(files.checkpoints(), settings.keep_checkpoints);
        let output = self.files.map(|(files, tracking)| -> Result<Output<'_>> {
            Ok(Output { checkpoints: checkpoints(files), tracker: tracking.tracker(self.model)? })
        });
        let output = output.transpose()?;
        // What an earlier process took for the first steps, this one does not know.
        let from_start =
            self.files.map_or(Ok(true), |(files, _)| checkpoints(files).steps().map(|steps| steps.is_empty()))?;
        let (parts, objective) = ((&train, &validation), self.config.objective);
        let bucket_bytes = self.config.distributed.bucket_mb as usize * 1_000_000;
        let mut trainer = Trainer::new(ranks, &classifier, parts, settings, objective, bucket_bytes, output)?;
        trainer.fit_memory(|message| self.say(message))?;
        let label = format!("train {}", self.model.name);
        let shown = self.tui.then(|| Progress::dashboard(&label, trainer.total_steps())).transpose();
        let shown = shown.unwrap_or_else(|error| {
            self.say(&format!("--tui: {error}: progress comes in lines"));
            None
        });
        let progress = shown.unwrap_or_else(|| Progress::new(&label, trainer.total_steps(), "step", self.quiet));
        let started = Instant::now();
        let profile = self.profile.clone().zip(self.files);
        let mut profile = profile.map(|(steps, (files, _))| Profile::new(steps, files.trace_json()));
        let outcome = signals.during(|| trainer.fit(signals, &progress, &mut profile, print));
        let written = profile.map_or(Ok(()), Profile::write);
        let outcome = outcome?; // what stopped the training is the news
        written?;
        let seconds = from_start.then(|| started.elapsed().as_secs_f64());
        progress.finish();
        let (Outcome::Finished(best), Some((files, _))) = (&outcome, self.files) else { return Ok(outcome) };
        let tokens = trainer.micro_batch_tokens();
        drop(trainer); // its moments make room for the best weights on their way

        classifier.load_weights(&checkpoints(files).path(best.step).join("model.safetensors"))?;
        let (truth, logits) = (validation.labels()?, logits(&classifier, &validation, tokens)?);
        let fitted = Temperature::fit(&truth, &logits);
        let (_, mut statistics) = judge(self.snapshot.labels(), &truth, &logits, Some(fitted.temperature))?;
        statistics.training_seconds = seconds;
        let staged = store::stage(&files.model())?;
        classifier.save(staged.path())?;
        tokenizer.save(staged.path())?;
        store::write_json(&staged.path().join("calibration.json"), &fitted)?;
        store::publish(staged, &files.model())?;
        report::curves(&files.metrics_jsonl(), &files.curves_png())?;
        store::write_json(&files.statistics_json(), &statistics)?; // last: it says that training is done
        Ok(outcome)
    }

    /// Refuses ids that the model's table of embeddings does not have.
    fn check_ids(&self, classifier: &Classifier, parts: &[&Dataset]) -> Result<()> {
        let ids = parts.iter().flat_map(|part| (0..part.len()).flat_map(|i| part.input_ids(i)));
        let highest = ids.map(|&id| id as u32).max().unwrap_or(0);
        match classifier.vocab_size() {
            Some(vocab_size) if u64::from(highest) >= vocab_size => Err(user_error!(
                "model {:?}: its tokenizer.json gives the id {highest}, and its config.json says vocab_size = \
                 {vocab_size}: the two files do not belong together",
                self.model.name
            )),
            _ => Ok(()),
        }
    }

    fn say(&self, message: &str) {
        if !self.quiet {
            crate::error::say(format_args!("{}: {message}", self.model.name));
        }
    }
}

/// What was loaded, what is new, what was unused.
fn describe(report: &LoadReport) -> String {
    let mut text = format!("{} tensors loaded", report.loaded);
    if !report.new.is_empty() {
        text += &format!("; new: {}", report.new.join(", "));
    }
    for (name, shape) in &report.reshaped {
        text += &format!("; new: {name} (there {shape:?}, for other labels)");
    }
    if !report.unused.is_empty() {
        text += &format!("; unused: {}", report.unused.join(", "));
    }
    text
}
