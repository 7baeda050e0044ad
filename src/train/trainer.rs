//! The training loop.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use kiln_kernels::{Tensor, cross_entropy};
use kiln_models::nn::Mode;
use kiln_models::nn::trace;

use super::agree::agree;
use super::device::{is_out_of_memory, planned_tokens};
use super::{
    Best, Checkpoints, Optimizer, Profile, Reducer, Schedule, Signal, Signals, State, Sums, Tree, class_weights,
    evaluate, gradient_coverage,
};
use crate::config::{self, Goal, Interval, Objective};
use crate::data::Dataset;
use crate::data::sampler::{Sampler, Share};
use crate::dist::Communicator;
use crate::pretrained::Classifier;
use crate::progress::Progress;
use crate::track::{self, Evaluation, Event, Step, Tracker};
use crate::user_error;

/// How a training ended.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done, or early stopping ended it: the best evaluation.
    Finished(Best),
    /// A signal came; the checkpoint of this step is written.
    Interrupted(Signal, u64),
}

/// What the main process writes of a training.
pub struct Output<'a> {
    /// Its checkpoints.
    pub checkpoints: Checkpoints,
    /// metrics.jsonl, and who else hears of it.
    pub tracker: Tracker<'a>,
}

/// One model's training. What it reads and writes is handed to it.
pub struct Trainer<'a> {
    ranks: &'a Communicator,
    classifier: &'a Classifier,
    train: &'a Dataset,
    validation: &'a Dataset,
    settings: &'a config::Train,
    objective: Objective,
    output: Option<Output<'a>>,
    optimizer: Optimizer,
    reducer: Reducer<'a>,
    tree: Tree,
    schedule: Schedule,
    sampler: Sampler,
    micro_batch_tokens: usize,
    class_weights: Option<Vec<f32>>,
    total_steps: u64,
    /// The first step of this process.
    first: u64,
    state: State,
    marks: Option<Marks>,
}

/// Moments of a step.
#[derive(Clone, Debug)]
pub struct Marks {
    /// When each bucket of gradients was complete, in the order in which they are summed.
    pub complete: Vec<Instant>,
    /// When the last backward had ended.
    pub backward: Instant,
}

impl<'a> Trainer<'a> {
    /// Prepares a training, and puts it where its newest checkpoint stands, if there is one: on all ranks
    /// as on the main process, the one that has an `output`.
    ///
    /// # Errors
    /// Settings that do not fit the model or the data, or a checkpoint that cannot be read.
    pub fn new(
        ranks: &'a Communicator,
        classifier: &'a Classifier,
        (train, validation): (&'a Dataset, &'a Dataset),
        settings: &'a config::Train,
        objective: Objective,
        bucket_bytes: usize,
        mut output: Option<Output<'a>>,
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
            config::Duration::Epochs(epochs) => epochs.saturating_mul(sampler.steps_per_epoch()),
            config::Duration::Steps(steps) => steps,
        };
        let counts = label_counts(train, classifier.id2label().len())?;
        label_counts(validation, counts.len())?;
        let class_weights = class_weights(&settings.class_weights, classifier.id2label(), &counts)?;
        let parameters = &classifier.built().parameters;
        if settings.deterministic {
            Tree::fits(ranks.world_size(), &parameters.device())?;
        }
        let mut optimizer = Optimizer::new(parameters, settings)?;
        let mut state = State::default();
        if let Some(Output { checkpoints, tracker }) = &mut output {
            state = checkpoints.resume(classifier, &mut optimizer)?.unwrap_or_default();
            tracker.resume(state.step)?;
        }
        let state = agree(ranks, state, parameters, &mut optimizer, (train, validation), (settings, bucket_bytes))?;
        let reducer = Reducer::new(ranks, parameters, bucket_bytes);
        let schedule = Schedule::new(settings.schedule, settings.warmup, total_steps);
        Ok(Self {
            ranks,
            classifier,
            train,
            validation,
            settings,
            objective,
            output,
            optimizer,
            reducer,
            tree: Tree::default(),
            schedule,
            sampler,
            micro_batch_tokens: settings.micro_batch_tokens,
            class_weights,
            total_steps,
            first: state.step,
            state,
            marks: None,
        })
    }

    /// Optimizer steps in all, unless early stopping ends it before.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Finds how many tokens of a micro-batch every rank's GPU holds, where the settings leave that to it:
    /// as many as the model's plan says, and of them what one run of the largest micro-batch that will come
    /// confirms. Its gradients are thrown away. `say` hears of every other try.
    ///
    /// # Errors
    /// Not even the longest example fits; or as [`fit`](Self::fit).
    pub fn fit_memory(&mut self, say: impl Fn(&str)) -> Result<()> {
        let parameters = &self.classifier.built().parameters;
        let device = parameters.device();
        if !self.settings.micro_batch_auto || device.is_cpu() {
            return Ok(());
        }
        let longest = (0..self.train.len()).map(|i| self.train.length(i)).max().unwrap_or(1);
        let mut tokens = planned_tokens(self.classifier, self.settings, longest)?;
        loop {
            // All ranks take what the smallest has room for.
            tokens = self.ranks.all_gather(&tokens)?.into_iter().min().unwrap_or(tokens);
            self.micro_batch_tokens = tokens;
            self.sampler.set_micro_batch_tokens(tokens);
            let steps = self
                .total_steps
                .saturating_sub(self.state.step)
                .min(super::memory::EPOCHS * self.sampler.steps_per_epoch());
            let largest = self.sampler.largest(self.state.step..self.state.step + steps, self.share());
            let tried = match largest.is_empty() {
                true => Ok(()),
                false => {
                    self.backward(&largest, 1.0, None).and_then(|losses| self.loss(&[largest], &[losses]).map(|_| ()))
                }
            };
            parameters.gradients_mut().fill(0.0)?;
            parameters.clear_written();
            let lacks = match tried {
                Ok(()) => false,
                Err(error) if is_out_of_memory(&error) => true,
                Err(error) => return Err(error),
            };
            if !self.ranks.all_gather(&lacks)?.contains(&true) {
                return Ok(());
            }
            if tokens <= longest {
                return Err(user_error!(
                    "the GPU's memory does not hold one example of {longest} tokens; lower max_length, or set \
                     train.recompute = true"
                ));
            }
            say(&format!("a micro-batch of {tokens} tokens does not fit the GPU's memory: trying half"));
            tokens = (tokens / 2).max(longest);
        }
    }

    /// The most tokens of a micro-batch: what the settings say, or what [`fit_memory`](Self::fit_memory)
    /// found.
    pub fn micro_batch_tokens(&self) -> usize {
        self.micro_batch_tokens
    }

    /// The micro-batches that this rank makes in the next step, as sums that are made one by one.
    pub fn next_micro_batches(&mut self) -> Vec<Vec<Vec<u32>>> {
        self.sampler.micro_batches(self.state.step, self.share())
    }

    /// Moments of the step made last; none where gradients are summed after backward, in a tree.
    pub fn marks(&self) -> Option<&Marks> {
        self.marks.as_ref()
    }

    /// What the gradients are cut into, to be summed over the ranks.
    pub fn reducer(&self) -> &Reducer<'a> {
        &self.reducer
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
        profile: &mut Option<Profile>,
        print: impl Fn(&Evaluation) -> Result<()>,
    ) -> Result<Outcome> {
        while self.state.step < self.total_steps && !self.state.stopped_early {
            profile.iter_mut().for_each(|profile| profile.before(self.state.step - self.first));
            let (done, signal) = self.step(signals.received())?;
            progress.step(&done);
            self.append(&Event::Step(done))?;

            let mut best = false;
            if self.is_due(self.settings.eval) {
                let evaluation = self.evaluate()?;
                best = evaluation.best;
                progress.evaluation(&evaluation, || print(&evaluation))?;
            }
            let due = best || signal.is_some() || self.state.stopped_early || self.is_due(self.settings.save);
            if let (true, Some(output)) = (due, &self.output) {
                let _span = trace::rare("checkpoint", "checkpoint");
                output.checkpoints.save(&self.state, self.classifier, &self.optimizer)?;
            }
            if let Some(signal) = signal {
                return Ok(Outcome::Interrupted(signal, self.state.step));
            }
        }
        if let (_, Some(signal)) = self.gather(Vec::new(), signals.received())? {
            return Ok(Outcome::Interrupted(signal, self.state.step)); // it came with the last checkpoint
        }
        self.state
            .best
            .map(Outcome::Finished)
            .ok_or_else(|| anyhow::anyhow!("no step was made: there is nothing to train"))
    }

    /// One optimizer step on all ranks, which agree on a signal that has come to any of them.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn step(&mut self, signal: Option<Signal>) -> Result<(Step, Option<Signal>)> {
        let parameters = &self.classifier.built().parameters;
        let (step, started) = (self.state.step, Instant::now());
        let _span = trace::span_of("step", "step", || Some(format!("step {}", step + 1)));
        let data_span = trace::span("sample", "data");
        let batch = self.sampler.batch(step);
        let weight = self.weight(&batch);
        drop(data_span);
        let losses = self.gradients(weight)?;
        if step == self.first && !losses.is_empty() {
            gradient_coverage(parameters).with_context(|| format!("step {step}; {}", self.blame(&batch)))?;
        }
        let (loss, signal) = self.gather(losses, signal)?;
        let norm_span = trace::span("gradient_norm", "optimizer");
        let grad_norm = self.optimizer.gradient_norm(parameters)?;
        drop(norm_span);
        if !grad_norm.is_finite() {
            bail!("step {step}: the gradient's norm is {grad_norm}; {}", self.blame(&batch));
        }
        let learning_rate = self.settings.learning_rate * self.schedule.factor(step);
        let optimizer_span = trace::span("optimizer", "optimizer");
        self.optimizer.step(parameters, step, learning_rate, grad_norm)?;
        drop(optimizer_span);
        self.state.step += 1;
        self.state.loss_sum += loss;
        self.state.loss_weight += weight;
        let tokens: usize = batch.iter().map(|&i| self.train.length(i as usize)).sum();
        let done = Step {
            step: self.state.step,
            time: track::now(),
            epoch: self.epoch(),
            train_loss: loss / weight,
            learning_rate,
            grad_norm,
            tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
        };
        Ok((done, signal))
    }

    #[cfg(test)]
    pub(super) fn gradients_of_the_next_step(&mut self) -> Result<()> {
        let batch = self.sampler.batch(self.state.step);
        let weight = self.weight(&batch);
        self.gradients(weight).map(drop)
    }

    /// The step's gradients, summed over all ranks. Returns the losses of this rank's sums that have examples.
    fn gradients(&mut self, weight: f64) -> Result<Vec<f64>> {
        let deterministic = self.settings.deterministic;
        let shares = self.next_micro_batches();
        let mut losses = Vec::new();
        let mut sums = (!deterministic).then(|| self.reducer.begin());
        for micro_batches in &shares {
            let last = micro_batches.len().saturating_sub(1);
            let each = micro_batches.iter().enumerate();
            let each = each.map(|(i, batch)| self.backward(batch, weight, sums.as_mut().filter(|_| i == last)));
            losses.push(each.collect::<Result<Vec<_>>>().map_err(|error| self.advise(error))?);
            if deterministic {
                self.tree.push(&self.classifier.built().parameters, shares.len())?;
            }
        }
        let backward = Instant::now();
        self.marks = match sums {
            Some(sums) => Some(Marks { complete: sums.finish()?, backward }),
            None => {
                self.reducer.sum_in_a_tree()?;
                None
            }
        };
        let sums = shares.iter().zip(&losses).filter(|(micro_batches, _)| !micro_batches.is_empty());
        sums.map(|(micro_batches, losses)| self.loss(micro_batches, losses)).collect()
    }

    /// This rank's part of every batch.
    fn share(&self) -> Share {
        let (rank, world_size) = (self.ranks.rank(), self.ranks.world_size());
        Share { rank, world_size, deterministic: self.settings.deterministic }
    }

    /// Sums the losses of all ranks, and agrees on a signal that has come to any of them.
    fn gather(&self, losses: Vec<f64>, signal: Option<Signal>) -> Result<(f64, Option<Signal>)> {
        let _span = trace::span("wait for all ranks' losses", "wait");
        let all = self.ranks.all_gather(&(losses, signal.map(Signal::number)))?;
        let loss = all.iter().flat_map(|(losses, _)| losses).sum();
        Ok((loss, all.iter().find_map(|(_, signal)| Signal::new((*signal)?))))
    }

    /// Forward and backward of a micro-batch, whose loss is its sum over the whole batch's weight:
    /// so any cut of the batch gives the same gradient. Returns each example's loss, which is not read
    /// here: that would wait for a GPU. `sums` is given with the last micro-batch: gradients are complete
    /// as backward leaves them.
    fn backward(&self, micro_batch: &[u32], weight: f64, sums: Option<&mut Sums<'_>>) -> Result<Tensor> {
        let span = trace::span_of("batch", "data", || Some(format!("{} examples", micro_batch.len())));
        let examples: Vec<_> = micro_batch.iter().map(|&i| self.train.example(i as usize)).collect();
        let ids = micro_batch.iter().map(|&i| u64::from(i)).collect();
        let labels: Vec<u32> = micro_batch.iter().filter_map(|&i| self.train.label(i as usize)).collect();
        let mode = Mode::Train { seed: self.settings.seed, step: self.state.step };
        let inputs = self.classifier.inputs(&examples, ids, mode)?.recompute(self.settings.recompute);
        drop(span);
        let span = trace::span("forward", "forward");
        let logits = self.classifier.built().model.forward(&inputs)?;
        let loss_span = trace::span("cross_entropy", "forward");
        let (losses, dlogits) = cross_entropy::forward(
            logits.data()?,
            &labels,
            self.class_weights.as_deref(),
            self.settings.label_smoothing as f32,
            weight,
        )?;
        drop(loss_span);
        drop(span);
        let _span = trace::span("backward", "backward");
        if let Some(tape) = inputs.tape() {
            match sums {
                Some(sums) => tape.backward_with(&logits, dlogits, |parameter| sums.complete(parameter))?,
                None => tape.backward(&logits, dlogits)?,
            }
        }
        Ok(losses)
    }

    /// The sum of the losses of some micro-batches, which have to be finite.
    fn loss(&self, micro_batches: &[Vec<u32>], losses: &[Tensor]) -> Result<f64> {
        let mut sum = 0.0;
        for (micro_batch, losses) in micro_batches.iter().zip(losses) {
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
    fn weight(&self, batch: &[u32]) -> f64 {
        let weight = |i: &u32| match (&self.class_weights, self.train.label(*i as usize)) {
            (Some(weights), Some(label)) => f64::from(weights[label as usize]),
            _ => 1.0,
        };
        let sum: f64 = batch.iter().map(weight).sum();
        if sum > 0.0 { sum } else { 1.0 } // where nothing counts: a gradient of zeros, not 0/0
    }

    fn evaluate(&mut self) -> Result<Evaluation> {
        let _span = trace::rare("evaluation", "evaluation");
        let figures = evaluate(self.ranks, self.classifier, self.validation, self.micro_batch_tokens)?
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
        self.append(&Event::Evaluation(evaluation.clone()))?;
        Ok(evaluation)
    }

    fn append(&mut self, event: &Event) -> Result<()> {
        self.output.as_mut().map_or(Ok(()), |output| output.tracker.append(event))
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

    /// Names the setting that an error of a GPU's memory calls for.
    fn advise(&self, error: anyhow::Error) -> anyhow::Error {
        if !is_out_of_memory(&error) {
            return error;
        }
        error.context(format!(
            "the GPU's memory does not hold a micro-batch of {} tokens: set train.micro_batch_tokens lower, or \
             train.recompute = true",
            self.micro_batch_tokens
        ))
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
