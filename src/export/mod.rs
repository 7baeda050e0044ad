//! Trained model → ONNX file, with a certificate that both say the same.
//!
//! [`onnx`] writes the graph that a model's own forward captured, [`verify`] holds ONNX Runtime
//! against that forward, and only what passes gets the name `model.onnx`. Where it is asked for,
//! [`quantize`] rewrites the graph for 8-bit integers, and what [`agreement`] lets pass is
//! `model.int8.onnx`.

pub mod agreement;
pub mod onnx;
pub mod proto;
pub mod quantize;
pub mod verify;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kiln_models::nn::Graph;
use serde_json::{Map, Value};

pub use agreement::Agreement;
pub use verify::Certificate;

use crate::config;
use crate::data::{Dataset, Part, Tokenizer};
use crate::infer::{self, Options, Predictor, Quantized, Runtime, Setting, Tested, predictor};
use crate::metrics::Temperature;
use crate::pretrained::Classifier;
use crate::store::{self, ModelDir, onnx_len};

/// Exports one model of a run from its `model/` to `model.onnx`, certifies it on the validation part
/// and writes export.json.
///
/// # Errors
/// Where the exported model and the trained one part ([`verify::certify`]): then model.onnx is as it
/// was before. And what reading, writing and ONNX Runtime say.
pub fn export_model(setting: &Setting<'_>, model: &config::Model) -> Result<Certificate> {
    let trained = Trained::load(setting, model)?;
    let Trained { files, classifier, dataset, options } = &trained;
    let staged = store::stage(&files.onnx())?;
    let path = trained.write(setting, model, &classifier.graph()?, &[], staged.path(), &files.onnx())?;
    let predictor = Predictor::open(setting.runtime, &path, *options)?;
    let logits = infer::predict(&predictor, dataset, &format!("certify {}", model.name), setting.quiet)?.logits;
    let tokens = model.train.micro_batch_tokens;
    let certificate = verify::certify(classifier, &predictor, dataset, &logits, model.max_length, tokens)
        .with_context(|| format!("model {:?} is not exported", model.name))?;

    publish(&path, &files.onnx())?;
    store::write_json(&files.export_json(), &certificate)?;
    Ok(certificate)
}

/// Quantises one model of a run from its `model/` to `model.int8.onnx`, holds it against its
/// `model.onnx` on the validation part and writes export.int8.json.
///
/// # Errors
/// The user's, where the two part ([`Agreement::gate`]): then model.int8.onnx is as it was before. And
/// what reading, writing and ONNX Runtime say.
pub fn quantize_model(setting: &Setting<'_>, model: &config::Model) -> Result<Agreement> {
    let trained = Trained::load(setting, model)?;
    let Trained { files, classifier, dataset, options } = &trained;
    let staged = store::stage(&files.onnx_int8())?;
    let metadata = [("kiln.quantize", "int8".to_owned())];
    let graph = quantize::int8(classifier.graph()?)?;
    let path = trained.write(setting, model, &graph, &metadata, staged.path(), &files.onnx_int8())?;
    let logits = |path: &Path, what: &str| {
        let predictor = Predictor::open(setting.runtime, path, *options)?;
        let what = format!("certify {} {what}", model.name);
        anyhow::Ok(infer::predict(&predictor, dataset, &what, setting.quiet)?.logits)
    };
    let (fp32, int8) = (logits(&files.onnx(), "fp32")?, logits(&path, "int8")?);
    let sizes = [onnx_len(&files.onnx())?, onnx_len(&path)?];
    let agreement = Agreement::new(classifier.id2label(), dataset, [&fp32, &int8], sizes)?;
    agreement
        .gate("set export.quantize = \"none\"")
        .with_context(|| format!("model {:?} is not quantised", model.name))?;

    publish(&path, &files.onnx_int8())?;
    store::write_json(&files.export_int8_json(), &agreement)?;
    Ok(agreement)
}

/// A trained model, and what its exports are held against.
struct Trained {
    files: ModelDir,
    classifier: Classifier,
    dataset: Dataset,
    options: Options,
}

impl Trained {
    /// Loads a model of a run from its `model/`, and the validation part as it reads it.
    fn load(setting: &Setting<'_>, model: &config::Model) -> Result<Trained> {
        let Setting { run, config, snapshot, .. } = *setting;
        let files = run.model(&model.name);
        let classifier = Classifier::load(&files.model())?;
        let tokenizer = Tokenizer::from_folder(&files.model())?;
        infer::check_labels(&model.name, classifier.id2label(), snapshot)?;
        let (threads, parts) = (model.train.threads, [Part::Validation]);
        let encoding = snapshot.encode(&tokenizer, model.max_length, classifier.input_names(), &parts, threads)?;
        let options =
            Options { workers: config.infer.workers, max_tokens: config.infer.max_tokens, pad_id: tokenizer.pad_id() };
        Ok(Trained { files, classifier, dataset: encoding.dataset(Part::Validation)?, options })
    }

    /// Writes a graph of the model into `folder`, which is to be dropped, under the name that it is to
    /// have as `target`, so that it finds its tensors beside it; `more` metadata comes on top.
    fn write(
        &self,
        setting: &Setting<'_>,
        model: &config::Model,
        graph: &Graph,
        more: &[(&str, String)],
        folder: &Path,
        target: &Path,
    ) -> Result<PathBuf> {
        let Setting { run, config, snapshot, .. } = *setting;
        let mut metadata = vec![
            ("id2label", id2label(&self.classifier)),
            ("kiln.experiment", run.experiment().name().into()),
            ("kiln.run_num", run.run_num().to_string()),
            ("kiln.model", model.name.clone()),
            ("kiln.snapshot", snapshot.hash().into()),
        ];
        let path = folder.join(target.file_name().with_context(|| format!("{} has no name", target.display()))?);
        let calibration = self.files.calibration_json();
        if calibration.is_file() {
            // What is run without it is as it was: the graph's logits stay the model's own.
            let fitted: Temperature = store::read_json(&calibration)?;
            metadata.push(("kiln.temperature", fitted.temperature.to_string()));
        }
        metadata.extend_from_slice(more);
        onnx::write(graph, &model.name, config.export.opset, &metadata, &path, onnx::EXTERNAL_ABOVE)?;
        Ok(path)
    }
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

/// Holds what a model's quantised export said of the test part against what its fp32 one said, and
/// writes test/certificate.int8.json.
///
/// # Errors
/// The user's, where the two part ([`Agreement::gate`]); what the file system says.
pub fn certify_quantized_test(
    setting: &Setting<'_>,
    model: &config::Model,
    tested: &Tested,
    quantized: &Quantized,
) -> Result<Agreement> {
    let files = setting.run.model(&model.name);
    let (logits, sizes) =
        ([&*tested.logits, &*quantized.logits], [onnx_len(&files.onnx())?, onnx_len(&files.onnx_int8())?]);
    let agreement = Agreement::new(&tested.predictor.id2label()?, &tested.dataset, logits, sizes)?;
    let fix = format!("set export.quantize = \"none\" and remove {}", files.onnx_int8().display());
    agreement.gate(&fix).with_context(|| format!("model {:?} on the test part", model.name))?;
    store::write_json(&files.test().join("certificate.int8.json"), &agreement)?;
    Ok(agreement)
}

/// The labels by id, as JSON.
fn id2label(classifier: &Classifier) -> String {
    let labels = (0..).zip(classifier.id2label());
    Value::from(labels.map(|(id, label)| (id.to_string(), label.as_str().into())).collect::<Map<_, Value>>())
        .to_string()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Data, Format, Source, Split};
    use crate::data::{Dataset, Example, prepare};
    use crate::infer::runtime;
    use serde_json::json;

    const LAYERS: usize = 3;
    const MAX_LENGTH: usize = 48;

    /// A small BERT with weights large enough that its logits differ from row to row.
    fn classifier(seed: u64) -> Classifier {
        let config = json!({
            "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64,
            "max_position_embeddings": 64, "initializer_range": 0.2,
        });
        let labels: Vec<String> = (0..12).map(|i| format!("label {i}")).collect(); // as many as the sample has
        Classifier::scratch("bert", config.as_object().unwrap(), 1000, 0, &labels, None, seed).unwrap()
    }

    fn write(classifier: &Classifier, folder: &Path) -> PathBuf {
        write_graph(classifier, classifier.graph().unwrap(), &folder.join("model.onnx"))
    }

    fn write_int8(classifier: &Classifier, folder: &Path) -> PathBuf {
        let graph = quantize::int8(classifier.graph().unwrap()).unwrap();
        write_graph(classifier, graph, &folder.join("model.int8.onnx"))
    }

    fn write_graph(classifier: &Classifier, graph: Graph, path: &Path) -> PathBuf {
        let metadata = [("id2label", id2label(classifier))];
        onnx::write(&graph, "m", 12, &metadata, path, onnx::EXTERNAL_ABOVE).unwrap();
        path.to_owned()
    }

    fn open(path: &Path) -> Predictor {
        let options = Options { workers: 2, max_tokens: 200, pad_id: 0 };
        Predictor::open(runtime::ensure(false).unwrap(), path, options).unwrap()
    }

    /// The sample's validation part.
    fn dataset(folder: &Path) -> Dataset {
        let data = Data {
            source: Source::Sample,
            format: Format::Auto,
            text: "text".into(),
            text_pair: None,
            label: "label".into(),
            id: Some("id".into()),
            split: Split { validation: 0.02, test: 0.02, seed: 1 },
        };
        let snapshot = prepare(&data, folder).unwrap();
        let tokenizer = snapshot.scratch_tokenizer(kiln_models::TokenizerKind::WordPiece, 1000).unwrap();
        let inputs = ["input_ids", "token_type_ids", "attention_mask"];
        let encoding = snapshot.encode(&tokenizer, MAX_LENGTH, &inputs, &[Part::Validation], 1).unwrap();
        encoding.dataset(Part::Validation).unwrap()
    }

    /// ONNX Runtime recognises attention by an exact pattern of nodes, and runs the graph as it
    /// stands where the pattern is off, as in the last layer, which is asked for first tokens alone.
    #[test]
    fn attention_fuses_in_every_layer_but_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(&classifier(1), folder.path());
        let ops = optimized_ops(runtime::ensure(false).unwrap(), &path).unwrap();
        assert_eq!(ops.get("Attention"), Some(&(LAYERS - 1)), "{ops:?}");
        assert_eq!((ops.get("BiasGelu"), ops.get("Gelu")), (Some(&(LAYERS - 1)), Some(&1)), "{ops:?}");
        assert_eq!(ops.get("LayerNormalization"), Some(&(2 * LAYERS + 1)), "{ops:?}");
        assert_eq!(ops.get("Softmax"), Some(&1), "the last layer's, of one token a sequence: {ops:?}");
    }

    /// What makes integers pay: no product is left in parts, and the bias goes with it.
    #[test]
    fn products_of_integers_fuse_in_every_layer() {
        let folder = tempfile::tempdir().unwrap();
        let path = write_int8(&classifier(1), folder.path());
        let ops = optimized_ops(runtime::ensure(false).unwrap(), &path).unwrap();
        // Queries, keys and values read one tensor.
        assert_eq!(ops.get("DynamicQuantizeLinear"), Some(&LAYERS), "{ops:?}");
        // The last layer makes keys and values of all tokens, the rest of one a sequence, in fp32.
        assert_eq!(ops.get("MatMulIntegerToFloat"), Some(&(3 * LAYERS - 1)), "{ops:?}");
        assert_eq!(ops.get("DynamicQuantizeMatMul"), Some(&(3 * (LAYERS - 1))), "{ops:?}");
        assert_eq!(ops.get("MatMulInteger"), None, "{ops:?}");
        // The mask's and the residual ones, and those of three tables.
        assert_eq!(ops.get("Add"), Some(&(3 * LAYERS + 2)), "{ops:?}");
        assert_eq!(ops.get("Gelu"), Some(&LAYERS), "{ops:?}");
        assert_eq!(ops.get("LayerNormalization"), Some(&(2 * LAYERS + 1)), "{ops:?}");
    }

    #[test]
    fn a_quantised_model_agrees_with_its_own_alone() {
        let folder = tempfile::tempdir().unwrap();
        let dataset = dataset(folder.path());
        let predict = |path: &Path| infer::predict(&open(path), &dataset, "", true).unwrap().logits;
        let trained = classifier(1);
        let (path, fp32) = (write_int8(&trained, folder.path()), write(&trained, folder.path()));
        let sizes = [onnx_len(&fp32).unwrap(), onnx_len(&path).unwrap()];
        let fp32 = predict(&fp32);
        let compare = |int8: &[Vec<f32>]| Agreement::new(trained.id2label(), &dataset, [&fp32, int8], sizes).unwrap();

        let same = compare(&predict(&path));
        assert_eq!(same.examples, dataset.len());
        let spread = fp32.iter().flatten().fold(0f32, |largest, logit| largest.max(logit.abs()));
        assert!(same.max_abs_diff < f64::from(spread) / 10.0, "{same:?} of logits up to {spread}");
        assert!(0.0 < same.mean_abs_diff && same.mean_abs_diff < same.max_abs_diff, "{same:?}");
        assert!(same.bytes_int8 * 2 < same.bytes_fp32, "{same:?}");

        let other = compare(&predict(&write_int8(&classifier(2), folder.path())));
        assert!(other.max_abs_diff > 10.0 * same.max_abs_diff, "{other:?} after {same:?}");
        assert!(other.gate("").is_err(), "{other:?}");
    }

    #[test]
    fn a_model_is_certified_against_itself_alone() {
        let folder = tempfile::tempdir().unwrap();
        let dataset = dataset(folder.path());
        let trained = classifier(1);
        let certify = |exported: &Classifier| {
            let predictor = open(&write(exported, folder.path()));
            let logits = infer::predict(&predictor, &dataset, "", true).unwrap().logits;
            verify::certify(&trained, &predictor, &dataset, &logits, MAX_LENGTH, 500)
        };

        let certificate = certify(&trained).unwrap();
        assert_eq!(certificate.examples, dataset.len());
        assert_eq!(certificate.lengths.last(), Some(&MAX_LENGTH));
        assert_eq!(certificate.argmax_flips, 0);
        assert!(certificate.mean_abs_diff <= certificate.max_abs_diff && certificate.max_abs_diff < 1e-5);
        assert_eq!(certificate.f1_trained, certificate.f1_onnx);

        let error = format!("{:#}", certify(&classifier(2)).unwrap_err());
        for part in ["part: their logits differ by up to", "predictions differ", "trained [", "ONNX Runtime ["] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }

    #[test]
    fn tensors_beside_a_model_come_and_go_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model.onnx");
        for (model, data) in [("a", None), ("b", Some("of b")), ("c", Some("of c")), ("d", None)] {
            let staging = store::stage(&target).unwrap();
            let staged = staging.path().join("model.onnx");
            fs::write(&staged, model).unwrap();
            if let Some(data) = data {
                fs::write(staging.path().join("model.onnx.data"), data).unwrap();
            }
            publish(&staged, &target).unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), model);
            assert_eq!(fs::read_to_string(folder.path().join("model.onnx.data")).ok().as_deref(), data);
        }
    }

    /// Another reader of the file: onnx's checker and Python's onnxruntime.
    #[test]
    fn python_reads_the_same() {
        let Some(python) = crate::testing::python() else { return };
        let folder = tempfile::tempdir().unwrap();
        let (trained, ids) = (classifier(1), folder.path().join("ids.json"));
        let path = write(&trained, folder.path());
        let sequences: Vec<Vec<i32>> = [1, 2, 7, 48].map(|n| (0..n).map(|i| 5 + i * 13 % 900).collect()).to_vec();
        fs::write(&ids, serde_json::to_vec(&sequences).unwrap()).unwrap();

        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/predict_onnx.py");
        let output = std::process::Command::new(python).arg(script).args([&path, &ids]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();

        let shape = json!(["batch", "sequence"]);
        assert_eq!(said["inputs"], json!({ "input_ids": shape, "attention_mask": shape, "token_type_ids": shape }));
        assert_eq!(said["outputs"], json!({ "logits": ["batch", 12] }));
        assert_eq!(said["opset"], json!({ "ai.onnx": 12 }));
        assert_eq!(said["metadata"], json!({ "id2label": id2label(&trained) }));
        let logits: Vec<Vec<f32>> = serde_json::from_value(said["logits"].clone()).unwrap();
        let examples: Vec<_> = sequences.iter().map(|ids| Example { input_ids: ids, token_type_ids: None }).collect();
        for (python, trained) in logits.concat().iter().zip(trained.logits(&examples).unwrap().concat()) {
            assert!((python - trained).abs() < 1e-5, "{python} is not {trained}");
        }
    }
}
