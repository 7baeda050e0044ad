//! Running exported models with ONNX Runtime, on CPU: [`test_model`] on the test part,
//! [`predict_rows`] on any rows.

mod predictions;
pub mod predictor;
pub mod runtime;

use std::path::Path;

use anyhow::{Context, Result, ensure};

pub use predictor::{Options, Predictions, Predictor};
pub use runtime::Runtime;

use crate::config::{self, Config, Infer, Quantize};
use crate::data::{Dataset, Example, Part, Row, Snapshot, Tokenizer, encode_texts};
use crate::metrics::{self, Statistics, Throughput};
use crate::progress::Progress;
use crate::store::{self, ModelDir, RunDir};
use crate::{report, user_error};

/// What exporting and testing take, whichever model of a run it is.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    /// ONNX Runtime.
    pub runtime: &'a Runtime,
    /// The run.
    pub run: &'a RunDir,
    /// Its configuration.
    pub config: &'a Config,
    /// Its data.
    pub snapshot: &'a Snapshot,
    /// No progress on stderr.
    pub quiet: bool,
}

/// An exported model with its tokenizer.
pub struct Exported<'a> {
    model: &'a config::Model,
    infer: Infer,
    tokenizer: Tokenizer,
    predictor: Predictor,
}

impl<'a> Exported<'a> {
    /// Opens an ONNX file of a run's model, the fp32 one or the quantised one, and the tokenizer in its
    /// `model/`.
    ///
    /// # Errors
    /// The user's, where the run has no such export of this model.
    pub fn open(
        runtime: &Runtime,
        files: &ModelDir,
        model: &'a config::Model,
        quantize: Quantize,
        infer: Infer,
    ) -> Result<Self> {
        let (path, set) = match quantize {
            Quantize::None => (files.onnx(), ""),
            Quantize::Int8 => (files.onnx_int8(), " --set export.quantize=int8"),
        };
        if !path.is_file() {
            return Err(user_error!("{} is not there; make it with kiln export{set}", path.display()));
        }
        let tokenizer = Tokenizer::from_folder(&files.model())?;
        let options = Options { workers: infer.workers, max_tokens: infer.max_tokens, pad_id: tokenizer.pad_id() };
        let predictor = Predictor::open(runtime, &path, options)?;
        Ok(Self { model, infer, tokenizer, predictor })
    }

    /// The temperature for probabilities: the model's own where they are to be `calibrated`, else 1.
    ///
    /// # Errors
    /// The user's, where the model has none.
    fn temperature(&self, calibrated: bool) -> Result<f64> {
        if !calibrated {
            return Ok(1.0);
        }
        self.predictor.temperature()?.ok_or_else(|| {
            user_error!(
                "model {0:?} has no temperature to calibrate by: its export says none. `kiln export` writes it where \
                 {0}/model/calibration.json is; that file comes of training, so a model without it has to be trained \
                 again, by kiln train --new; or leave out --calibrated",
                self.model.name
            )
        })
    }
}

/// What [`test_model`] found.
pub struct Tested {
    /// The content of test/statistics.json.
    pub statistics: Statistics,
    /// The test part, as the model reads it.
    pub dataset: Dataset,
    /// The model's logits for it, by row.
    pub logits: Vec<Vec<f32>>,
    /// The model.
    pub predictor: Predictor,
}

/// What [`test_quantized`] found.
pub struct Quantized {
    /// The content of test/statistics.int8.json.
    pub statistics: Statistics,
    /// The quantised model's logits for the test part, by row.
    pub logits: Vec<Vec<f32>>,
}

/// Runs a model's ONNX file on the test part and writes what it makes of it into `test/`:
/// predictions.parquet, its probabilities `calibrated` by the model's temperature or as they are,
/// confusion.png and statistics.json, which does not depend on that.
///
/// # Errors
/// The user's, where the run has no export of the model, or the snapshot no test part or other labels
/// than the model, or where the model has no temperature; what ONNX Runtime and the file system say.
pub fn test_model(setting: &Setting<'_>, model: &config::Model, calibrated: bool) -> Result<Tested> {
    let (files, snapshot, name) = (setting.run.model(&model.name), setting.snapshot, &model.name);
    let exported = Exported::open(setting.runtime, &files, model, Quantize::None, setting.config.infer)?;
    let temperature = exported.temperature(calibrated)?;
    let Exported { infer, tokenizer, predictor, .. } = exported;
    let labels = predictor.id2label()?;
    check_labels(name, &labels, snapshot)?;
    let rows = snapshot.rows(Part::Test)?;
    let dataset = snapshot
        .encode(&tokenizer, model.max_length, &predictor.input_names(), &[Part::Test], infer.workers)?
        .dataset(Part::Test)?;
    ensure!(rows.len() == dataset.len(), "the test part has {} rows, and {} encoded", rows.len(), dataset.len());

    let predictions = predict(&predictor, &dataset, &format!("test {name}"), setting.quiet)?;
    let (truth, predicted, statistics) = judge(&predictor, &dataset, &predictions)?;
    let test = files.test();
    predictions::write(&test.join("predictions.parquet"), &labels, &rows, &predictions.logits, temperature)?;
    report::confusion(&metrics::confusion(labels.len(), &truth, &predicted), &labels, &test.join("confusion.png"))?;
    store::write_json(&test.join("statistics.json"), &statistics)?;
    Ok(Tested { statistics, dataset, logits: predictions.logits, predictor })
}

/// Runs a model's quantised ONNX file, where there is one, on the test part that [`test_model`] read,
/// and writes test/statistics.int8.json.
///
/// # Errors
/// As [`test_model`]'s.
pub fn test_quantized(setting: &Setting<'_>, model: &config::Model, tested: &Tested) -> Result<Option<Quantized>> {
    let files = setting.run.model(&model.name);
    if !files.onnx_int8().is_file() {
        return Ok(None);
    }
    let predictor = Predictor::open(setting.runtime, &files.onnx_int8(), tested.predictor.options())?;
    let dataset = &tested.dataset;
    check_labels(&model.name, &predictor.id2label()?, setting.snapshot)?;
    let predictions = predict(&predictor, dataset, &format!("test {} int8", model.name), setting.quiet)?;
    let (.., statistics) = judge(&predictor, dataset, &predictions)?;
    store::write_json(&files.test().join("statistics.int8.json"), &statistics)?;
    Ok(Some(Quantized { statistics, logits: predictions.logits }))
}

/// What a model says of every row of a part.
pub(crate) fn predict(predictor: &Predictor, dataset: &Dataset, what: &str, quiet: bool) -> Result<Predictions> {
    let examples: Vec<_> = (0..dataset.len()).map(|i| dataset.example(i)).collect();
    let progress = Progress::new(what, dataset.len() as u64, "row", quiet);
    let predictions = predictor.predict(&examples, &progress)?;
    progress.finish();
    Ok(predictions)
}

/// The labels of the test part, a model's predictions of them, and the figures of both.
fn judge(
    predictor: &Predictor,
    dataset: &Dataset,
    predictions: &Predictions,
) -> Result<(Vec<u32>, Vec<u32>, Statistics)> {
    let Predictions { logits, throughput } = predictions;
    let truth = dataset.labels().context("the test part")?;
    let (predicted, mut statistics) = metrics::judge(&predictor.id2label()?, &truth, logits, predictor.temperature()?)?;
    statistics.throughput = Some(*throughput);
    Ok((truth, predicted, statistics))
}

/// Predicts rows, which need no label, and writes them to `output` as a predictions.parquet, its
/// probabilities `calibrated` by the model's temperature or as they are.
///
/// # Errors
/// The user's, where the model has no temperature; what the tokenizer, ONNX Runtime and the file system say.
pub fn predict_rows(
    model: &Exported<'_>,
    rows: &[Row],
    output: &Path,
    calibrated: bool,
    quiet: bool,
) -> Result<Throughput> {
    let temperature = model.temperature(calibrated)?;
    let texts: Vec<_> = rows.iter().map(|row| (row.text.as_str(), row.text_pair.as_deref())).collect();
    let encoded = encode_texts(&model.tokenizer, &texts, model.model.max_length, model.infer.workers)?;
    let examples: Vec<_> = encoded
        .iter()
        .map(|row| Example { input_ids: &row.input_ids, token_type_ids: Some(&row.token_type_ids) })
        .collect();
    let progress = Progress::new("predict", rows.len() as u64, "row", quiet);
    let predictions = model.predictor.predict(&examples, &progress)?;
    progress.finish();
    predictions::write(output, &model.predictor.id2label()?, rows, &predictions.logits, temperature)?;
    Ok(predictions.throughput)
}

/// Refuses data whose labels are not the model's: their ids would mean something else.
pub(crate) fn check_labels(model: &str, labels: &[String], snapshot: &Snapshot) -> Result<()> {
    if labels == snapshot.labels() {
        return Ok(());
    }
    Err(user_error!(
        "model {model:?} knows the labels {}, and the data in {} has {}; a model needs the data it was trained on",
        labels.join(", "),
        snapshot.dir().display(),
        snapshot.labels().join(", ")
    ))
}
