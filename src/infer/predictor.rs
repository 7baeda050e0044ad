//! Logits of an exported model for many examples, as fast as the machine's cores allow.
//!
//! Examples are sorted by length into batches of at most `max_tokens` tokens, and each of N workers
//! runs one batch at a time on one thread. All workers run one session, so weights lie in memory
//! once; a second session would hold, and optimise, a copy of its own.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use ort::AsPointer;
use ort::logging::LogLevel;
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{Tensor, ValueType};

use super::runtime::Runtime;
use crate::data::Example;
use crate::metrics::Throughput;
use crate::progress::Progress;

/// How a [`Predictor`] runs.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Batches at a time, each on one thread.
    pub workers: usize,
    /// Tokens in a batch at most, padding included; a longer example is a batch of its own.
    pub max_tokens: usize,
    /// The tokenizer's padding id.
    pub pad_id: u32,
}

/// What a model says of examples, and how fast.
#[derive(Clone, Debug)]
pub struct Predictions {
    /// Logits `[labels]` of each example, in the order given.
    pub logits: Vec<Vec<f32>>,
    /// Wall-clock, from the first batch to the last.
    pub throughput: Throughput,
}

/// An exported model, ready to run.
#[derive(Debug)]
pub struct Predictor {
    path: PathBuf,
    session: Session,
    inputs: Vec<Column>,
    input_names: Vec<CString>,
    output_name: CString,
    labels: usize,
    options: Options,
}

/// A model's input, by its Hugging Face name.
#[derive(Clone, Copy, Debug)]
enum Column {
    InputIds,
    AttentionMask,
    TokenTypeIds,
}

impl Predictor {
    /// Opens the ONNX file `model`.
    ///
    /// # Errors
    /// Where ONNX Runtime refuses the file, or where the model asks for inputs other than
    /// `input_ids`, `attention_mask` and `token_type_ids`, or does not give `logits` of a fixed
    /// number of labels.
    pub fn open(runtime: &Runtime, model: &Path, options: Options) -> Result<Predictor> {
        let session = builder(runtime)
            .and_then(|mut builder| builder.commit_from_file(model))
            .with_context(|| format!("ONNX Runtime could not open {}", model.display()))?;

        let inputs = session.inputs().iter().map(|input| match input.name() {
            "input_ids" => Ok(Column::InputIds),
            "attention_mask" => Ok(Column::AttentionMask),
            "token_type_ids" => Ok(Column::TokenTypeIds),
            name => bail!("{} needs an input {name}, which kiln does not know how to fill", model.display()),
        });
        let labels = match session.outputs() {
            [logits] if logits.name() == "logits" => match logits.dtype() {
                ValueType::Tensor { shape, .. } => shape.get(1).copied().filter(|&labels| labels > 0),
                _ => None,
            },
            _ => None,
        };
        let labels = labels.with_context(|| format!("{} does not give logits [batch, labels]", model.display()))?;
        Ok(Predictor {
            path: model.to_owned(),
            inputs: inputs.collect::<Result<_>>()?,
            input_names: session.inputs().iter().map(|i| CString::new(i.name())).collect::<Result<_, _>>()?,
            output_name: c"logits".into(),
            labels: labels as usize,
            session,
            options,
        })
    }

    /// How it runs.
    pub fn options(&self) -> Options {
        self.options
    }

    /// The model's input columns, in its order.
    pub fn input_names(&self) -> Vec<&str> {
        self.session.inputs().iter().map(|input| input.name()).collect()
    }

    /// The labels by id, as the export wrote them into the model.
    ///
    /// # Errors
    /// A model that kiln did not export.
    pub fn id2label(&self) -> Result<Vec<String>> {
        let path = self.path.display();
        let json = self.session.metadata()?.custom("id2label");
        let json = json.with_context(|| format!("{path}: its metadata has no id2label"))?;
        let id2label: BTreeMap<usize, String> =
            serde_json::from_str(&json).with_context(|| format!("{path}: its metadata id2label is {json:?}"))?;
        ensure!(
            id2label.keys().copied().eq(0..self.labels),
            "{path}: its metadata id2label does not name its {} labels: {json}",
            self.labels
        );
        Ok(id2label.into_values().collect())
    }

    /// The model's temperature, as the export wrote it into the model, if it did.
    ///
    /// # Errors
    /// One that is no number above 0.
    pub fn temperature(&self) -> Result<Option<f64>> {
        let Some(text) = self.session.metadata()?.custom("kiln.temperature") else { return Ok(None) };
        let temperature = text.parse().ok().filter(|t: &f64| t.is_finite() && *t > 0.0);
        let temperature = temperature
            .with_context(|| format!("the model's metadata kiln.temperature is {text:?}: needs a number above 0"))?;
        Ok(Some(temperature))
    }

    /// Predicts all of `examples`, and reports to `progress` how many are done.
    ///
    /// # Errors
    /// Where an example has no tokens, or ids that the model does not know, or logits that are not
    /// finite.
    pub fn predict(&self, examples: &[Example<'_>], progress: &Progress) -> Result<Predictions> {
        let started = Instant::now();
        let batches = batches(examples, self.options.max_tokens);
        let (next, finished) = (AtomicUsize::new(0), AtomicU64::new(0));
        let work = || -> Result<Vec<(usize, Vec<f32>)>> {
            let mut done = Vec::new();
            while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
                let logits = self.run(batch.iter().map(|&i| examples[i])).inspect_err(|_| {
                    next.store(batches.len(), Ordering::Relaxed); // the others need not go on
                });
                let logits = logits.with_context(|| format!("one of examples {}", first_few(batch)))?;
                done.extend(batch.iter().copied().zip(logits));
                let rows = batch.len() as u64;
                progress.set(finished.fetch_add(rows, Ordering::Relaxed) + rows, "");
            }
            Ok(done)
        };
        let done = thread::scope(|scope| {
            let workers = self.options.workers.clamp(1, batches.len().max(1));
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect::<Result<Vec<_>>>()
        })?;

        let mut logits = vec![Vec::new(); examples.len()];
        for (i, row) in done.into_iter().flatten() {
            logits[i] = row;
        }
        let tokens: usize = examples.iter().map(|example| example.input_ids.len()).sum();
        let throughput = Throughput::new(examples.len() as u64, tokens as u64, started.elapsed().as_secs_f64());
        Ok(Predictions { logits, throughput })
    }

    /// Logits of one batch, padded to its longest example.
    pub fn run<'a>(&self, batch: impl IntoIterator<Item = Example<'a>>) -> Result<Vec<Vec<f32>>> {
        let batch: Vec<_> = batch.into_iter().collect();
        let length = batch.iter().map(|example| example.input_ids.len()).max().unwrap_or(0);
        ensure!(batch.iter().all(|example| !example.input_ids.is_empty()), "an example has no tokens");

        let inputs = self.inputs.iter().map(|input| {
            let mut values = Vec::with_capacity(batch.len() * length); // [batch, length]
            for Example { input_ids, token_type_ids } in &batch {
                let end = values.len() + length;
                match input {
                    Column::InputIds => values.extend(input_ids.iter().map(|&id| i64::from(id))),
                    Column::AttentionMask => values.resize(values.len() + input_ids.len(), 1),
                    Column::TokenTypeIds => {
                        values.extend(token_type_ids.unwrap_or_default().iter().map(|&id| i64::from(id)));
                    }
                }
                values.resize(end, if let Column::InputIds = input { self.options.pad_id.into() } else { 0 });
            }
            Tensor::from_array(([batch.len(), length], values))
        });
        let inputs: Vec<Tensor<i64>> = inputs.collect::<Result<_, _>>()?;
        let mut logits = Tensor::from_array(([batch.len(), self.labels], vec![0f32; batch.len() * self.labels]))?;

        let names = |names: &[CString]| names.iter().map(|name| name.as_ptr()).collect::<Vec<*const c_char>>();
        let (input_names, values) = (names(&self.input_names), inputs.iter().map(AsPointer::ptr).collect::<Vec<_>>());
        let (output_name, mut output) = (self.output_name.as_ptr(), logits.ptr_mut());
        // SAFETY: names and values are as many as said, and they and the session outlive the call,
        // which writes into `logits` alone. ort's own `run` asks for `&mut Session` because not all
        // execution providers bear concurrent runs; the CPU's, the only one here, does
        // (microsoft/onnxruntime#114).
        let status = unsafe {
            (ort::api().Run)(
                self.session.ptr().cast_mut(),
                ptr::null(),
                input_names.as_ptr(),
                values.as_ptr(),
                values.len(),
                &output_name,
                1,
                &mut output,
            )
        };
        // SAFETY: the status is the call's, and nothing else takes it.
        unsafe { ort::Error::result_from_status(status) }?;

        let logits = logits.extract_tensor().1;
        ensure!(logits.iter().all(|logit| logit.is_finite()), "the model gave logits that are not finite");
        Ok(logits.chunks(self.labels).map(<[f32]>::to_vec).collect())
    }
}

/// Tokens that fill a worker, which is one core: four times as many took 1.7 times the memory and were
/// no faster, on a machine with other work some 8 % slower (MiniLM-L6, texts of up to 512 tokens).
const FILL: usize = 1024;

/// Examples by number in batches of at most `max_tokens`, and of at most [`FILL`], the longest first:
/// similar lengths share a batch, and the last batches, at which workers may wait for each other, are
/// the shortest.
fn batches(examples: &[Example<'_>], max_tokens: usize) -> Vec<Vec<usize>> {
    let length = |i: usize| examples[i].input_ids.len();
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(length(i)));
    let mut batches = Vec::new();
    let mut rest = order.as_slice();
    while let [longest, ..] = rest {
        let rows = (max_tokens.min(FILL) / length(*longest).max(1)).clamp(1, rest.len());
        let (batch, after) = rest.split_at(rows);
        batches.push(batch.to_vec());
        rest = after;
    }
    batches
}

/// `3, 17, 4, …`
fn first_few(examples: &[usize]) -> String {
    let few: Vec<String> = examples.iter().take(8).map(usize::to_string).collect();
    format!("{}{}", few.join(", "), if examples.len() > few.len() { ", …" } else { "" })
}

/// Session options for one thread a run and the graph optimised as far as it goes.
pub(crate) fn builder(runtime: &Runtime) -> ort::Result<SessionBuilder> {
    Ok(Session::builder(runtime.environment())?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_intra_threads(1)?
        .with_inter_threads(1)?
        .with_intra_op_spinning(false)?
        .with_inter_op_spinning(false)?
        .with_log_level(LogLevel::Fatal)?) // what goes wrong is returned; no need to print it too
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_every_example_once_and_at_most_max_tokens() {
        let ids = [0; 100];
        let lengths: Vec<usize> = (0..57).map(|i| 1 + i * 37 % 100).collect();
        let examples: Vec<_> =
            lengths.iter().map(|&n| Example { input_ids: &ids[..n], token_type_ids: None }).collect();
        let batches = batches(&examples, 64);

        let mut seen: Vec<usize> = batches.concat();
        assert!(seen.is_sorted_by_key(|&i| std::cmp::Reverse(lengths[i])));
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..57));
        for batch in &batches {
            let padded = batch.len() * lengths[batch[0]];
            assert!(padded <= 64 || batch.len() == 1, "{batch:?} has {padded} tokens");
        }
        assert!(self::batches(&[], 64).is_empty());
        assert!(self::batches(&examples, usize::MAX).iter().all(|batch| batch.len() * lengths[batch[0]] <= FILL));
    }
}
