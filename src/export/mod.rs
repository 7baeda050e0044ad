//! Trained model → ONNX file, with a certificate that both say the same.
//!
//! [`onnx`] writes the graph that a model's own forward captured, [`verify`] holds ONNX Runtime
//! against that forward, and only what passes gets the name `model.onnx`.

pub mod onnx;
pub mod proto;
pub mod verify;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

pub use verify::Certificate;

use crate::config;
use crate::data::{Part, Tokenizer};
use crate::infer::{Options, Predictor, Runtime, Setting, Tested, predictor};
use crate::pretrained::Classifier;
use crate::progress::Progress;
use crate::store;

/// Exports one model of a run from its `model/` to `model.onnx`, certifies it on the validation part
/// and writes export.json.
///
/// # Errors
/// Where the exported model and the trained one part ([`verify::certify`]): then model.onnx is as it
/// was before. And what reading, writing and ONNX Runtime say.
pub fn export_model(setting: &Setting<'_>, model: &config::Model) -> Result<Certificate> {
    let Setting { runtime, run, config, snapshot, quiet } = *setting;
    let files = run.model(&model.name);
    let classifier = Classifier::load(&files.model())?;
    let tokenizer = Tokenizer::from_folder(&files.model())?;
    let id2label: Map<String, Value> =
        (0..).zip(classifier.id2label()).map(|(id, label)| (id.to_string(), label.as_str().into())).collect();
    let metadata = [
        ("id2label", Value::from(id2label).to_string()),
        ("kiln.experiment", run.experiment().name().into()),
        ("kiln.run_num", run.run_num().to_string()),
        ("kiln.model", model.name.clone()),
        ("kiln.snapshot", snapshot.hash().into()),
    ];

    // Under its own name, so that the model finds its tensors beside it, but in a folder to be dropped.
    let staged = store::stage(&files.onnx())?;
    let path = staged.path().join(files.onnx().file_name().context("model.onnx has no name")?);
    onnx::write(&classifier.graph()?, &model.name, config.export.opset, &metadata, &path, onnx::EXTERNAL_ABOVE)?;

    let (threads, parts) = (model.train.threads, [Part::Validation]);
    let dataset = snapshot
        .encode(&tokenizer, model.max_length, classifier.input_names(), &parts, threads)?
        .dataset(Part::Validation)?;
    let options =
        Options { workers: config.infer.workers, max_tokens: config.infer.max_tokens, pad_id: tokenizer.pad_id() };
    let predictor = Predictor::open(runtime, &path, options)?;
    let examples: Vec<_> = (0..dataset.len()).map(|i| dataset.example(i)).collect();
    let progress = Progress::new(&format!("certify {}", model.name), dataset.len() as u64, "row", quiet);
    let logits = predictor.predict(&examples, &progress)?.logits;
    progress.finish();
    let tokens = model.train.micro_batch_tokens;
    let certificate = verify::certify(&classifier, &predictor, &dataset, &logits, model.max_length, tokens)
        .with_context(|| format!("model {:?} is not exported", model.name))?;

    publish(&path, &files.onnx())?;
    store::write_json(&files.export_json(), &certificate)?;
    Ok(certificate)
}

/// Holds what a model said of the test part against the weights in its `model/`, and writes
/// test/certificate.json; `None` where the weights are not there.
///
/// # Errors
/// As [`export_model`]'s.
pub fn certify_test(setting: &Setting<'_>, model: &config::Model, tested: &Tested) -> Result<Option<Certificate>> {
    let files = setting.run.model(&model.name);
    if !files.model().join("model.safetensors").is_file() {
        return Ok(None);
    }
    let classifier = Classifier::load(&files.model())?;
    let Tested { dataset, logits, predictor, .. } = tested;
    let tokens = model.train.micro_batch_tokens;
    let certificate = verify::certify(&classifier, predictor, dataset, logits, model.max_length, tokens)
        .with_context(|| format!("model {:?} on the test part", model.name))?;
    store::write_json(&files.test().join("certificate.json"), &certificate)?;
    Ok(Some(certificate))
}

/// Gives a model that was written and synced to `staged` its name, its tensors first.
fn publish(staged: &Path, target: &Path) -> Result<()> {
    let [staged_data, data] = [staged, target].map(|path| path.with_added_extension("data"));
    let attempt = || {
        if staged_data.exists() {
            fs::rename(&staged_data, &data)?;
            fs::rename(staged, target)?;
        } else {
            fs::rename(staged, target)?;
            if data.exists() {
                fs::remove_file(&data)?; // of an earlier export
            }
        }
        target.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    attempt().with_context(|| format!("cannot write {}", target.display()))
}

/// How many nodes of each operator there are in a model as ONNX Runtime runs it, after its fusions.
///
/// # Errors
/// What ONNX Runtime says.
pub fn optimized_ops(runtime: &Runtime, model: &Path) -> Result<BTreeMap<String, usize>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("optimized.onnx");
    let optimize =
        || -> ort::Result<_> { predictor::builder(runtime)?.with_optimized_model_path(&path)?.commit_from_file(model) };
    optimize().with_context(|| format!("ONNX Runtime could not optimize {}", model.display()))?;
    let graph = onnx::read(&path)?.graph.context("the optimized model has no graph")?;
    let mut ops = BTreeMap::new();
    for node in graph.node {
        *ops.entry(node.op_type).or_default() += 1;
    }
    Ok(ops)
}
