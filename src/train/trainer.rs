//! The training loop.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use kiln_kernels::{Tensor, cross_entropy};
use kiln_models::nn::Mode;

use super::{
    Best, Checkpoints, Optimizer, Schedule, Signal, Signals, State, class_weights, evaluate, gradient_coverage,
};
use crate::config::{self, Goal, Interval, Objective};
use crate::data::Dataset;
use crate::data::sampler::Sampler;
use crate::pretrained::Classifier;
use crate::progress::Progress;
use crate::track::{Evaluation, Event, MetricsLog, Step};

/// How a training ended.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done, or early stopping ended it: the best evaluation.
    Finished(Best),
    /// A signal came; the checkpoint of this step is written.
    Interrupted(Signal, u64),
}

/// One model's training. What it reads and writes is handed to it.
pub struct Trainer<'a> {
    classifier: &'a Classifier,
    train: &'a Dataset,
    validation: &'a Dataset,
    settings: &'a config::Train,
    objective: Objective,
    checkpoints: Checkpoints,
    log: MetricsLog,
    optimizer: Optimizer,
    schedule: Schedule,
    sampler: Sampler,
    class_weights: Option<Vec<f32>>,
    total_steps: u64,
    state: State,
}

impl<'a> Trainer<'a> {
    /// Prepares a training, and puts it where its newest checkpoint stands, if there is one.
    ///
    /// # Errors
    /// Settings that do not fit the model or the data, or a checkpoint that cannot be read.
    pub fn new(
        classifier: &'a Classifier,
        (train, validation): (&'a Dataset, &'a Dataset),
        settings: &'a config::Train,
        objective: Objective,
        checkpoints: Checkpoints,
        mut log: MetricsLog,
    ) -> Result<Self> {
        let lengths: Vec<u32> = (0..train.len()).map(|i| train.length(i) as u32).collect();
        let sampler = Sampler::new(
            lengths,
            settings.seed,
            settings.batch_size,
            settings.micro_batch_tokens,
            settings.gradient_accumulation_steps,
        );
        let total_steps = match settings.duration {
            config::Duration::Epochs(epochs) => epochs * sampler.steps_per_epoch(),
            config::Duration::Steps(steps) => steps,
        };
        let counts = label_counts(train, classifier.id2label().len())?;
        label_counts(validation, counts.len())?;
        let class_weights = class_weights(&settings.class_weights, classifier.id2label(), &counts)?;
        let mut optimizer = Optimizer::new(&classifier.built().parameters, settings)?;
        let state = checkpoints.resume(classifier, &mut optimizer)?.unwrap_or_default();
        log.cut_back(state.step)?;
        let schedule = Schedule::new(settings.schedule, settings.warmup, total_steps);
        Ok(Self {
            classifier,
            train,
            validation,
            settings,
            objective,
            checkpoints,
            log,
            optimizer,
            schedule,
            sampler,
            class_weights,
            total_steps,
            state,
        })
    }

    /// Optimizer steps in all, unless early stopping ends it before.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Trains to the end. `print` takes each evaluation.
    ///
    /// # Errors
    /// A parameter without a gradient at the first step; a loss or gradient that is not finite; what
    /// kernels and the file system say.
    pub fn fit(
        &mut self,
        signals: &Signals,
        progress: &Progress,
        print: impl Fn(&Evaluation) -> Result<()>,
    ) -> Result<Outcome> {
        let parameters = &self.classifier.built().parameters;
        let first = self.state.step;
        while self.state.step < self.total_steps && !self.state.stopped_early {
            let (step, started) = (self.state.step, Instant::now());
            let batch = self.sampler.micro_batches(step);
            let weight = self.weight(&batch);
            let losses =
                batch.iter().map(|micro_batch| self.backward(micro_batch, weight)).collect::<Result<Vec<_>>>()?;
            let loss = self.loss(&batch, &losses)?;
            if step == first {
                gradient_coverage(parameters)
                    .with_context(|| format!("step {step}; {}", self.blame(&batch.concat())))?;
            }
            let grad_norm = self.optimizer.gradient_norm(parameters)?;
            if !grad_norm.is_finite() {
                bail!("step {step}: the gradient's norm is {grad_norm}; {}", self.blame(&batch.concat()));
            }
            let learning_rate = self.settings.learning_rate * self.schedule.factor(step);
            self.optimizer.step(parameters, step, learning_rate, grad_norm)?;

            self.state.step += 1;
            self.state.loss_sum += loss;
            self.state.loss_weight += weight;
            let tokens: usize = batch.iter().flatten().map(|&i| self.train.length(i as usize)).sum();
            let tokens_per_second = tokens as f64 / started.elapsed().as_secs_f64();
            let (step, epoch, train_loss) = (self.state.step, self.epoch(), loss / weight);
            self.log.append(&Event::Step(Step {
                step,
                epoch,
                train_loss,
                learning_rate,
                grad_norm,
                tokens_per_second,
            }))?;
            progress.set(step, &format!("loss {train_loss:.3} · {tokens_per_second:.0} tokens/s"));

            let mut best = false;
            if self.is_due(self.settings.eval) {
                let evaluation = self.evaluate()?;
                best = evaluation.best;
                progress.suspend(|| print(&evaluation))?;
            }
            let signal = signals.received();
            if best || signal.is_some() || self.state.stopped_early || self.is_due(self.settings.save) {
                self.checkpoints.save(&self.state, self.classifier, &self.optimizer)?;
            }
            if let Some(signal) = signal {
                return Ok(Outcome::Interrupted(signal, self.state.step));
            }
        }
        if let Some(signal) = signals.received() {
            return Ok(Outcome::Interrupted(signal, self.state.step)); // it came with the last checkpoint
        }
        self.state
            .best
            .map(Outcome::Finished)
            .ok_or_else(|| anyhow::anyhow!("no step was made: there is nothing to train"))
    }

    /// Forward and backward of a micro-batch, whose loss is its sum over the whole batch's weight:
    /// so any cut of the batch gives the same gradient. Returns each example's loss, which is not read
    /// here: that would wait for a GPU.
    fn backward(&self, micro_batch: &[u32], weight: f64) -> Result<Tensor> {
        let examples: Vec<_> = micro_batch.iter().map(|&i| self.train.example(i as usize)).collect();
        let ids = micro_batch.iter().map(|&i| u64::from(i)).collect();
        let labels: Vec<u32> = micro_batch.iter().filter_map(|&i| self.train.label(i as usize)).collect();
        let mode = Mode::Train { seed: self.settings.seed, step: self.state.step };
        let inputs = self.classifier.inputs(&examples, ids, mode)?.recompute(self.settings.recompute);
        let logits = self.classifier.built().model.forward(&inputs)?;
        let (losses, dlogits) = cross_entropy::forward(
            logits.data()?,
            &labels,
            self.class_weights.as_deref(),
            self.settings.label_smoothing as f32,
            weight,
        )?;
        if let Some(tape) = inputs.tape() {
            tape.backward(&logits, dlogits)?;
        }
        Ok(losses)
    }

    /// The sum of a batch's losses, which have to be finite.
    fn loss(&self, batch: &[Vec<u32>], losses: &[Tensor]) -> Result<f64> {
        let mut sum = 0.0;
        for (micro_batch, losses) in batch.iter().zip(losses) {
            let losses = losses.to_vec1::<f32>()?;
            let broken: Vec<u32> =
                micro_batch.iter().zip(&losses).filter(|(_, loss)| !loss.is_finite()).map(|(&i, _)| i).collect();
            if !broken.is_empty() {
                bail!("step {}: the loss is not finite; {}", self.state.step, self.blame(&broken));
            }
            sum += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
        }
        Ok(sum)
    }

    /// The total weight of a global batch's examples.
    fn weight(&self, batch: &[Vec<u32>]) -> f64 {
        let weight = |i: &u32| match (&self.class_weights, self.train.label(*i as usize)) {
            (Some(weights), Some(label)) => f64::from(weights[label as usize]),
            _ => 1.0,
        };
        let sum: f64 = batch.iter().flatten().map(weight).sum();
        if sum > 0.0 { sum } else { 1.0 } // where nothing counts: a gradient of zeros, not 0/0
    }

    fn evaluate(&mut self) -> Result<Evaluation> {
        let figures = evaluate(self.classifier, self.validation, self.settings.micro_batch_tokens)?
            .statistics(self.classifier.id2label());
        let value = figures.get(self.objective.metric);
        let best = self.state.best.is_none_or(|best| match self.objective.goal {
            Goal::Max => value > best.value,
            Goal::Min => value < best.value,
        });
        let state = &mut self.state;
        if best {
            state.best = Some(Best { step: state.step, value });
        }
        state.evaluations_without_gain = if best { 0 } else { state.evaluations_without_gain + 1 };
        let patience = self.settings.early_stopping_patience;
        state.stopped_early = patience > 0 && state.evaluations_without_gain >= patience;
        let train_loss = state.loss_sum / state.loss_weight;
        (state.loss_sum, state.loss_weight) = (0.0, 0.0);
        let evaluation = Evaluation {
            step: self.state.step,
            epoch: self.epoch(),
            train_loss,
            validation_loss: figures.loss.unwrap_or(f64::NAN),
            validation_accuracy: figures.accuracy,
            validation_macro_f1: figures.macro_f1,
            validation_micro_f1: figures.micro_f1,
            validation_weighted_f1: figures.weighted_f1,
            best,
        };
        self.log.append(&Event::Evaluation(evaluation.clone()))?;
        Ok(evaluation)
    }

    /// Whether what comes at `interval` is due after the steps done; all is due at the end.
    fn is_due(&self, interval: Interval) -> bool {
        let every = match interval {
            Interval::Epoch => self.sampler.steps_per_epoch(),
            Interval::Steps(steps) => steps,
        };
        self.state.step.is_multiple_of(every) || self.state.step == self.total_steps
    }

    fn epoch(&self) -> f64 {
        self.state.step as f64 / self.sampler.steps_per_epoch() as f64
    }

    /// Says which rows of the training part a broken step had read.
    fn blame(&self, examples: &[u32]) -> String {
        let shown: Vec<_> = examples.iter().take(8).map(u32::to_string).collect();
        let more = if examples.len() > shown.len() {
            format!(" and {} more", examples.len() - shown.len())
        } else {
            String::new()
        };
        format!(
            "its examples are rows {}{more} of the training part; a lower train.learning_rate (now {}) or \
             train.max_grad_norm (now {}) is the usual remedy",
            shown.join(", "),
            self.settings.learning_rate,
            self.settings.max_grad_norm
        )
    }
}

/// How often a part has each label.
fn label_counts(dataset: &Dataset, labels: usize) -> Result<Vec<u64>> {
    let mut counts = vec![0; labels];
    for i in 0..dataset.len() {
        match dataset.label(i).map(|label| label as usize) {
            Some(label) if label < labels => counts[label] += 1,
            got => bail!("row {i} of a part has label {got:?}; the snapshot has {labels} labels: prepare it again"),
        }
    }
    Ok(counts)
}
