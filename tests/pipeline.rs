//! The whole way, by the real binary: text in, a tested ONNX classifier out, seen from outside.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use kiln::config::{Config, Overrides};
use kiln::data::{Dataset, Snapshot};
use kiln::export::{self, onnx};
use kiln::infer::runtime;
use kiln::pretrained::Classifier;
use kiln::store;
use serde_json::{Value, json};

use crate::support::{kiln, python};

/// One short run of the embedded quickstart, for all tests here.
struct Finished {
    folder: tempfile::TempDir,
    stdout: String,
    stderr: String,
}

static FINISHED: LazyLock<Finished> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let output = quickstart(folder.path()).output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{stderr}");
    Finished { folder, stdout, stderr }
});

fn quickstart(root: &Path) -> Command {
    let mut command = kiln();
    command.arg("train").arg("--root").arg(root).args(["--set", "train.max_steps=40", "--set", "train.eval_steps=20"]);
    command
}

impl Finished {
    fn experiment(&self) -> PathBuf {
        self.folder.path().join("quickstart")
    }
    fn run(&self) -> PathBuf {
        self.experiment().join("runs/1")
    }
    fn model(&self) -> PathBuf {
        self.run().join("small-bert")
    }
    fn snapshot(&self) -> PathBuf {
        let record: Value = store::read_json(&self.run().join("run.json")).unwrap();
        self.experiment().join("data").join(record["snapshot"].as_str().unwrap())
    }
    fn encodings(&self) -> Vec<PathBuf> {
        let snapshot = self.snapshot();
        let encoding = |part: &str| {
            let folders = fs::read_dir(snapshot.join(part)).unwrap().map(|entry| entry.unwrap().path());
            folders.into_iter().find(|path| path.join("card.json").exists() || path.join("train/card.json").exists())
        };
        let (training, test) = (encoding("training").unwrap(), encoding("test").unwrap());
        vec![training.join("train"), training.join("validation"), test]
    }
}

/// A root with a copy of the run, to be spoiled.
fn copy(run: &Finished) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    assert!(Command::new("cp").arg("-r").arg(run.experiment()).arg(folder.path()).status().unwrap().success());
    folder
}

fn json(output: std::process::Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_run_tree_is_whole() {
    let run = &*FINISHED;
    for file in [
        "run.json",
        "lock.json",
        "experiment.toml",
        "report.html",
        "small-bert/model/config.json",
        "small-bert/model/model.safetensors",
        "small-bert/model/tokenizer.json",
        "small-bert/model/calibration.json",
        "small-bert/model.onnx",
        "small-bert/export.json",
        "small-bert/metrics.jsonl",
        "small-bert/statistics.json",
        "small-bert/curves.png",
        "small-bert/test/statistics.json",
        "small-bert/test/predictions.parquet",
        "small-bert/test/confusion.png",
        "small-bert/test/certificate.json",
    ] {
        assert!(run.run().join(file).is_file(), "{file} is missing");
    }
    let record: Value = store::read_json(&run.run().join("run.json")).unwrap();
    assert_eq!(
        (&record["status"], &record["job_type"], &record["run_num"]),
        (&json!("finished"), &json!("training"), &json!(1))
    );
    let evaluations: Vec<_> = run.stdout.lines().filter(|line| line.starts_with("epoch=")).collect();
    assert_eq!(evaluations.len(), 2, "{}", run.stdout);
    assert!(
        evaluations[1].contains(" step=40 ") && evaluations[1].contains(" validation_macro_f1=0."),
        "{}",
        evaluations[1]
    );
    assert!(run.stdout.trim_end().lines().last().unwrap().contains("macro_f1="), "the table ends stdout");
    assert!(run.stderr.contains("run quickstart/1 in"), "{}", run.stderr);
    assert_eq!(walk(&run.experiment(), ".tmp-"), Vec::<PathBuf>::new(), "temporary files are left");
}

/// Paths below `folder` whose names begin with `prefix`.
fn walk(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.file_name().unwrap().to_str().unwrap().starts_with(prefix) {
            found.push(path.clone());
        }
        if path.is_dir() {
            found.extend(walk(&path, prefix));
        }
    }
    found
}

#[test]
fn the_certificates_hold() {
    for file in ["export.json", "test/certificate.json"] {
        let certificate: Value = store::read_json(&FINISHED.model().join(file)).unwrap();
        assert!(certificate["max_abs_diff"].as_f64().unwrap() <= 1e-4, "{certificate}");
        assert_eq!(certificate["argmax_flips"], 0);
        assert_eq!(certificate["f1_trained"], certificate["f1_onnx"]);
        let lengths: Vec<u64> = serde_json::from_value(certificate["lengths"].clone()).unwrap();
        assert!(lengths.contains(&1) && lengths.contains(&160), "{lengths:?}");
    }
}

#[test]
fn onnx_runtime_fuses_every_layer() {
    let ops = export::optimized_ops(runtime::ensure(false).unwrap(), &FINISHED.model().join("model.onnx")).unwrap();
    // Two layers, of which the last asks for the first tokens alone: there is no fused form of that.
    assert_eq!((ops.get("Attention"), ops.get("Softmax")), (Some(&1), Some(&1)), "{ops:?}");
    // A norm after the embeddings and two in each layer.
    assert_eq!(ops.get("LayerNormalization"), Some(&5), "{ops:?}");
    for unfused in ["Erf", "ReduceMean"] {
        assert_eq!(ops.get(unfused), None, "{ops:?}");
    }
}

#[test]
fn an_export_that_parts_from_the_model_is_refused() {
    // The weights under an exported graph are changed: the certificate has to notice.
    let folder = copy(&FINISHED);
    let model = folder.path().join("quickstart/runs/1/small-bert");
    let mut graph = onnx::read(&model.join("model.onnx")).unwrap();
    let weights = graph.graph.as_mut().unwrap().initializer.iter_mut().find(|i| i.name == "classifier.bias").unwrap();
    weights.raw_data[3] ^= 0x40; // an exponent's bit of the first label's bias
    fs::write(model.join("model.onnx"), prost::Message::encode_to_vec(&graph)).unwrap();
    let output = kiln().args(["infer", "quickstart/1", "--root"]).arg(folder.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("small-bert") && stderr.contains("logit"), "{stderr}");
}

/// A run with a quantised model beside, for the tests of that: long enough to tell labels apart, since
/// what says the same of every row agrees with anything.
static QUANTIZED: LazyLock<Finished> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let mut command = quickstart(folder.path());
    command.args(["--set", "export.quantize=int8", "--set", "train.max_steps=160", "--set", "train.eval_steps=160"]);
    let output = command.output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{stderr}");
    Finished { folder, stdout, stderr }
});

fn export(root: &Path, options: &[&str]) -> std::process::Output {
    kiln().args(["export", "quickstart/1", "--root"]).arg(root).args(options).output().unwrap()
}

fn infer(root: &Path, options: &[&str]) -> std::process::Output {
    kiln().args(["infer", "quickstart/1", "--root"]).arg(root).args(options).output().unwrap()
}

#[test]
fn a_quantised_model_is_exported_tested_and_predicts() {
    let (root, model) = (QUANTIZED.folder.path(), QUANTIZED.model());
    let last = QUANTIZED.stdout.trim_end().lines().last().unwrap();
    assert!(last.starts_with("model=small-bert int8 examples=") && last.contains(" examples_per_second="), "{last}");
    assert!(QUANTIZED.stderr.contains("exported model=small-bert int8 examples="), "{}", QUANTIZED.stderr);

    let said = json(infer(root, &["--json"]));
    let read = |file: &str| store::read_json::<Value>(&model.join(file)).unwrap();
    let statistics = read("test/statistics.int8.json");
    assert_eq!(said["int8"], statistics);
    assert_eq!(said["macro_f1"], read("test/statistics.json")["macro_f1"]);
    assert!(statistics["throughput"]["examples_per_second"].as_f64().unwrap() > 0.0);

    for (file, of) in [("export.int8.json", "statistics.json"), ("test/certificate.int8.json", "test/statistics.json")]
    {
        let certificate = read(file);
        let number = |key: &str| certificate[key].as_f64().unwrap_or_else(|| panic!("{key} of {certificate}"));
        assert_eq!(certificate["examples"], read(of)["examples"]);
        assert!((number("f1_fp32") - read(of)["macro_f1"].as_f64().unwrap()).abs() < 1e-12, "{certificate}");
        assert!(number("agreement") >= 0.99 && number("f1_fp32") - number("f1_int8") <= 0.005, "{certificate}");
        assert!(0.0 < number("mean_abs_diff") && number("mean_abs_diff") < number("max_abs_diff"), "{certificate}");
        for (key, file) in [("bytes_fp32", "model.onnx"), ("bytes_int8", "model.int8.onnx")] {
            assert_eq!(certificate[key], fs::metadata(model.join(file)).unwrap().len());
        }
        assert!(number("bytes_int8") < 0.35 * number("bytes_fp32"), "{certificate}");
    }
    assert_eq!(statistics["macro_f1"], read("test/certificate.int8.json")["f1_int8"]);

    let metadata = onnx::read(&model.join("model.int8.onnx")).unwrap().metadata_props;
    let keys: Vec<_> = metadata.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys[..5], ["id2label", "kiln.experiment", "kiln.run_num", "kiln.model", "kiln.snapshot"]);
    assert_eq!(keys[5..], ["kiln.temperature", "kiln.quantize"]);
    assert_eq!(metadata.last().unwrap().value, "int8");

    let (input, output) = (root.join("new.jsonl"), root.join("new.parquet"));
    fs::write(&input, "{\"text\": \"An external penetration test\"}\n".repeat(3)).unwrap();
    let options = ["--int8", "--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()];
    let result = infer(root, &options);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    assert_eq!(predictions(&output).len(), 3);
    let result = infer(FINISHED.folder.path(), &options);
    let stderr = String::from_utf8_lossy(&result.stderr);
    assert_eq!(result.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("model.int8.onnx is not there") && stderr.contains("export.quantize=int8"), "{stderr}");
}

#[test]
fn python_reads_a_quantised_model() {
    let Some(python) = python() else { return };
    let model = QUANTIZED.model();
    let ids = QUANTIZED.folder.path().join("ids.json");
    let rows: Vec<Vec<i32>> = [1, 5, 40].map(|n| (0..n).map(|i| 5 + i * 131 % 2000).collect()).to_vec();
    fs::write(&ids, serde_json::to_vec(&rows).unwrap()).unwrap();
    let call = |file: &str| {
        let mut command = Command::new(&python);
        json(command.arg("tests/python/predict_onnx.py").arg(model.join(file)).arg(&ids).output().unwrap())
    };
    // onnx.checker is in the script.
    let (fp32, int8) = (call("model.onnx"), call("model.int8.onnx"));
    assert_eq!(
        (&int8["inputs"], &int8["outputs"], &int8["opset"]),
        (&fp32["inputs"], &fp32["outputs"], &fp32["opset"])
    );
    assert_eq!(int8["metadata"]["id2label"], fp32["metadata"]["id2label"]);
    let logits = |said: &Value| serde_json::from_value::<Vec<Vec<f64>>>(said["logits"].clone()).unwrap().concat();
    let (fp32, int8) = (logits(&fp32), logits(&int8));
    assert_ne!(fp32, int8);
    let spread = fp32.iter().fold(0f64, |largest, logit| largest.max(logit.abs()));
    assert!(fp32.iter().zip(&int8).all(|(a, b)| (a - b).abs() < spread / 10.0), "{int8:?} for {fp32:?}");
}

#[test]
fn a_quantised_model_that_parts_from_its_own_is_refused() {
    // The words under a quantised graph are changed: the test part has to notice.
    let folder = copy(&QUANTIZED);
    let model = folder.path().join("quickstart/runs/1/small-bert");
    let mut graph = onnx::read(&model.join("model.int8.onnx")).unwrap();
    let initializers = &mut graph.graph.as_mut().unwrap().initializer;
    let table = initializers.iter_mut().find(|i| i.name.ends_with("word_embeddings.weight.rows.int8"));
    table.unwrap().raw_data.iter_mut().for_each(|byte| *byte = byte.wrapping_neg());
    fs::write(model.join("model.int8.onnx"), prost::Message::encode_to_vec(&graph)).unwrap();
    let output = infer(folder.path(), &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for part in ["model \"small-bert\" on the test part", "agree on 0.", "(needs 0.99)", "macro F1", "export.quantize"]
    {
        assert!(stderr.contains(part), "{part} is not in: {stderr}");
    }

    // And one that is no model at all is named.
    fs::write(model.join("model.int8.onnx"), b"no model").unwrap();
    let output = infer(folder.path(), &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("could not open") && stderr.contains("model.int8.onnx"), "{stderr}");
}

#[test]
fn a_model_that_integers_cannot_hold_is_not_quantised() {
    use candle_core::{Device, Tensor, safetensors};
    // Each value of attention gets a weight that dwarfs its others, on an input that is always 0: the
    // model goes on reading its text, and its integers are zeros.
    let folder = copy(&QUANTIZED);
    let model = folder.path().join("quickstart/runs/1/small-bert");
    let weights = model.join("model/model.safetensors");
    let mut tensors = safetensors::load(&weights, &Device::Cpu).unwrap();
    let mut change = |name: &str, value: f32| {
        let tensor = tensors.get_mut(&format!("bert.{name}")).unwrap();
        let mut values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let columns = if tensor.rank() == 2 { tensor.dims()[1] } else { values.len() };
        values.iter_mut().step_by(columns).for_each(|v| *v = value);
        *tensor = Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap();
    };
    for (norm, layer) in [("embeddings.LayerNorm", 0), ("encoder.layer.0.output.LayerNorm", 1)] {
        change(&format!("{norm}.weight"), 0.0);
        change(&format!("{norm}.bias"), 0.0);
        change(&format!("encoder.layer.{layer}.attention.self.value.weight"), 1000.0);
    }
    safetensors::save(&tensors, &weights).unwrap();
    let read = |file: &str| fs::read(model.join(file)).unwrap();
    let before = ["model.int8.onnx", "export.int8.json"].map(read);

    let output = export(folder.path(), &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for part in ["model \"small-bert\" is not quantised", "agree on 0.", "set export.quantize = \"none\""] {
        assert!(stderr.contains(part), "{part} is not in: {stderr}");
    }
    assert!(before == ["model.int8.onnx", "export.int8.json"].map(read), "the earlier ones are as they were");
    assert_eq!(walk(&model, ".tmp-"), Vec::<PathBuf>::new(), "temporary files are left");
    // Without them the export goes through.
    let output = export(folder.path(), &["--set", "export.quantize=none"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_trained_run_gets_a_quantised_model_later() {
    let folder = copy(&FINISHED);
    let model = folder.path().join("quickstart/runs/1/small-bert");
    assert!(!model.join("model.int8.onnx").exists());
    let exported = json(export(folder.path(), &["--json", "--set", "export.quantize=int8"]));
    assert_eq!(exported["int8"], store::read_json::<Value>(&model.join("export.int8.json")).unwrap());
    assert!(exported["max_abs_diff"].as_f64().unwrap() <= 1e-4, "{exported}");

    // An unfinished one goes on, since what is trained does not depend on it.
    let train = |options: &[&str]| {
        let output = quickstart(folder.path()).args(["--set", "train.max_steps=4"]).args(options).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        stderr
    };
    assert!(!train(&["--stop-after", "export"]).contains("int8"));
    let stderr = train(&["--set", "export.quantize=int8"]);
    assert!(stderr.contains("resuming quickstart/2 after training"), "{stderr}");
    for file in ["model.int8.onnx", "export.int8.json", "test/statistics.int8.json", "test/certificate.int8.json"] {
        assert!(folder.path().join("quickstart/runs/2/small-bert").join(file).is_file(), "{file} is missing");
    }
}

#[test]
fn python_reads_what_kiln_wrote() {
    let Some(python) = python() else { return };
    let run = &*FINISHED;
    let encodings = run.encodings();
    let opened = json(Command::new(&python).arg("tests/python/load_dataset.py").args(&encodings).output().unwrap());
    for (folder, opened) in encodings.iter().zip(opened.as_array().unwrap()) {
        let dataset = Dataset::open(folder).unwrap();
        assert_eq!(opened["num_rows"], dataset.len());
        assert_eq!(opened["columns"], json!(["input_ids", "attention_mask", "token_type_ids", "labels"]));
        assert_eq!(opened["features"]["input_ids"], "list<int32>");
        assert_eq!(opened["last"]["input_ids"], json!(dataset.input_ids(dataset.len() - 1)));
        assert_eq!(opened["last"]["labels"], json!(dataset.label(dataset.len() - 1)));
    }

    // The same rows through transformers, Python's onnxruntime, and kiln's own forward.
    let dataset = Dataset::open(&encodings[2]).unwrap();
    let rows: Vec<_> = (0..12).map(|i| dataset.example(i)).collect();
    let ids = run.folder.path().join("ids.json");
    fs::write(&ids, serde_json::to_vec(&rows.iter().map(|row| row.input_ids).collect::<Vec<_>>()).unwrap()).unwrap();
    let call = |script: &str, model: &str| {
        json(Command::new(&python).arg(script).arg(run.model().join(model)).arg(&ids).output().unwrap())
    };
    let (torch, onnx) =
        (call("tests/python/load_model.py", "model"), call("tests/python/predict_onnx.py", "model.onnx"));
    let classifier = Classifier::load(&run.model().join("model")).unwrap();
    for (i, expected) in classifier.logits(&rows).unwrap().iter().enumerate() {
        for (peer, output) in [("transformers", &torch), ("onnxruntime", &onnx)] {
            for (label, &logit) in expected.iter().enumerate() {
                let got = output["logits"][i][label].as_f64().unwrap();
                assert!((got - f64::from(logit)).abs() < 2e-5, "{peer}: row {i}, label {label}: {got} for {logit}");
            }
        }
    }
    assert_eq!(torch["architecture"], "BertForSequenceClassification");
    assert_eq!((&torch["missing_keys"], &torch["unexpected_keys"]), (&json!([]), &json!([])));
    let labels = classifier.id2label().iter().enumerate();
    let id2label: serde_json::Map<_, _> = labels.map(|(i, label)| (i.to_string(), json!(label))).collect();
    assert_eq!(torch["id2label"], Value::from(id2label.clone()));
    let metadata: Value = serde_json::from_str(onnx["metadata"]["id2label"].as_str().unwrap()).unwrap();
    assert_eq!(metadata, Value::from(id2label));
    assert_eq!(onnx["opset"], json!({"ai.onnx": 12}));
    assert_eq!(
        onnx["inputs"],
        json!({"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"], "token_type_ids": ["batch", "sequence"]})
    );
}

#[test]
fn new_rows_are_predicted_in_their_order() {
    let run = &*FINISHED;
    let snapshot = Snapshot::open(&run.snapshot()).unwrap();
    let rows = snapshot.rows(kiln::data::Part::Test).unwrap();
    let (input, output) = (run.folder.path().join("new.jsonl"), run.folder.path().join("new.parquet"));
    let lines: String = rows.iter().take(30).map(|row| format!("{}\n", json!({"text": row.text}))).collect();
    fs::write(&input, lines).unwrap();
    let infer = |options: &[&str]| {
        let mut command = kiln();
        command.args(["infer", "quickstart/1", "--root"]).arg(run.folder.path()).args(options);
        command.arg("--input").arg(&input).arg("--output").arg(&output).output().unwrap()
    };
    let result = infer(&[]);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    // On the same rows the test part's predictions say the same.
    let new = predictions(&output);
    assert_eq!(new.len(), 30);
    assert_eq!(new[..], predictions(&run.model().join("test/predictions.parquet"))[..30]);

    fs::write(&input, "{\"body\": \"no text\"}\n").unwrap();
    let result = infer(&[]);
    assert_eq!(result.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&result.stderr).contains("text"), "{}", String::from_utf8_lossy(&result.stderr));
}

/// The predicted labels of a predictions.parquet.
fn predictions(path: &Path) -> Vec<String> {
    use arrow_array::{Array, StringArray};
    let file = fs::File::open(path).unwrap();
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
    let mut all = Vec::new();
    for batch in reader {
        let batch = batch.unwrap();
        let column = batch.column_by_name("prediction").unwrap().as_any().downcast_ref::<StringArray>().unwrap();
        all.extend((0..column.len()).map(|i| column.value(i).to_owned()));
    }
    all
}

#[test]
fn a_finished_run_stays_and_a_stopped_one_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let train = |options: &[&str]| {
        let output = quickstart(folder.path()).args(["--set", "train.max_steps=4"]).args(options).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = train(&["--stop-after", "train"]);
    assert_eq!(code, Some(0), "{stderr}");
    let model = folder.path().join("quickstart/runs/1/small-bert");
    assert!(model.join("model").is_dir() && !model.join("model.onnx").exists());
    let (code, stderr) = train(&[]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("resuming quickstart/1"), "{stderr}");
    assert!(model.join("test/statistics.json").exists());
    let (code, stderr) = train(&["--resume", "quickstart/1"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("finished"), "{stderr}");
    let (code, stderr) = train(&["--stop-after", "train"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("run quickstart/2 in"), "where all are finished a new run starts: {stderr}");
}

#[test]
fn a_model_starts_from_an_earlier_run() {
    let folder = copy(&FINISHED);
    let mut command = quickstart(folder.path());
    command.args(["--stop-after", "train", "--set", "train.max_steps=1", "--set", "train.learning_rate=1e-12"]);
    let output = command.args(["--set", "train.init_from=quickstart/1/small-bert"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let f1 = |number: u32| -> f64 {
        let file = folder.path().join(format!("quickstart/runs/{number}/small-bert/statistics.json"));
        store::read_json::<Value>(&file).unwrap()["macro_f1"].as_f64().unwrap()
    };
    assert_eq!(f1(1), f1(2), "a step of no length leaves the earlier model as it was");
}

#[test]
fn a_run_is_made_again_to_the_bit_or_the_first_difference_is_said() {
    let folder = copy(&FINISHED);
    let run = folder.path().join("quickstart/runs/1");
    let repro = |run: &Path| {
        let output = kiln().arg("repro").arg(run).arg("--json").output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), serde_json::from_slice::<Value>(&output.stdout).unwrap_or_else(|_| panic!("{stderr}")))
    };
    let (code, same) = repro(&run);
    assert_eq!(code, Some(0), "{same}");
    let weights = store::sha256_file(&run.join("small-bert/model/model.safetensors")).unwrap();
    let expected = json!({"identical": true, "steps": 40, "first_difference": null, "weights": [weights, weights]});
    assert_eq!((&same["identical"], &same["models"]["small-bert"]), (&json!(true), &expected));
    assert_eq!(same["differences"], json!([]));

    let metrics = run.join("small-bert/metrics.jsonl");
    let mut events: Vec<Value> =
        fs::read_to_string(&metrics).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let event = events.iter_mut().find(|event| event["step"] == 17).unwrap();
    let loss = event["train_loss"].as_f64().unwrap();
    event["train_loss"] = json!(loss.next_up());
    fs::write(&metrics, events.iter().map(|event| format!("{event}\n")).collect::<String>()).unwrap();
    let (code, other) = repro(&run);
    assert_eq!(code, Some(1), "{other}");
    let what = format!("train_loss was {}, is {loss}", loss.next_up());
    assert_eq!(other["models"]["small-bert"]["first_difference"], json!({"step": 17, "what": what}));

    let two = tempfile::tempdir().unwrap();
    let trained = quickstart(two.path()).args(["--nproc-per-node", "2", "--stop-after", "train"]).status().unwrap();
    assert!(trained.success());
    let (code, same) = repro(&two.path().join("quickstart/runs/1"));
    assert_eq!(code, Some(0), "{same}");
}

/// In huggingface_hub's cache, where nothing is fetched: what fetches has tests of its own, with a Hub.
#[test]
fn a_model_starts_from_the_hub() {
    let run = &*FINISHED;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("experiment.toml");
    let toml = "name = \"hub\"\nroot = \"runs\"\n[data]\nsource = \"sample\"\n[[model]]\nname = \"m\"\n\
                path = \"hf:kiln/small@v1\"\n[train]\nmax_steps = 2\n";
    fs::write(&file, toml).unwrap();
    let train = || {
        let mut command = kiln();
        command.arg("train").arg(&file).args(["--stop-after", "train"]);
        command.env("HF_HOME", folder.path().join("hf")).env("HF_HUB_OFFLINE", "1");
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = train();
    assert_eq!(code, Some(2));
    assert!(
        stderr.contains("hf:kiln/small@v1 is not in ") && stderr.contains("nothing is fetched offline"),
        "{stderr}"
    );

    let place = folder.path().join("hf/hub/models--kiln--small");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    fs::create_dir_all(place.join("refs")).unwrap();
    fs::create_dir_all(place.join("snapshots")).unwrap();
    fs::write(place.join("refs/v1"), commit).unwrap();
    std::os::unix::fs::symlink(run.model().join("model"), place.join("snapshots").join(commit)).unwrap();
    let (code, stderr) = train();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("tensors loaded"), "{stderr}");
    let lock: Value = store::read_json(&folder.path().join("runs/hub/runs/1/lock.json")).unwrap();
    let weights = store::sha256_file(&run.model().join("model/model.safetensors")).unwrap();
    assert_eq!(lock["base"]["m"]["model.safetensors"], weights);
}

#[test]
fn a_loss_that_is_not_finite_names_its_step_and_rows() {
    let folder = copy(&FINISHED);
    let weights = folder.path().join("quickstart/runs/1/small-bert/model/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len(); // of the last tensor
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    let mut command = quickstart(folder.path());
    let output =
        command.args(["--stop-after", "train", "--set", "train.init_from=quickstart/1/small-bert"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("step 0: the loss is not finite; its examples are rows "), "{stderr}");
    let record: Value = store::read_json(&folder.path().join("quickstart/runs/2/run.json")).unwrap();
    assert_eq!(record["status"], "failed");
}

#[test]
fn a_run_that_needed_its_options_is_tested_without_them() {
    let folder = tempfile::tempdir().unwrap();
    let (file, rows) = (folder.path().join("template.toml"), folder.path().join("rows.csv"));
    assert!(kiln().arg("sample").arg("--output").arg(&rows).output().unwrap().status.success());
    let quickstart = fs::read_to_string(crate::support::repository("experiments/quickstart.toml")).unwrap();
    fs::write(&file, quickstart.replace("source = \"sample\"", "")).unwrap();
    let mut command = kiln();
    command.arg("train").arg(&file).arg("--root").arg(folder.path()).args(["--set", "train.max_steps=2"]);
    let output = command.arg("--set").arg(format!("data.source={}", rows.display())).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = kiln().args(["infer", "quickstart/1", "--json", "--root"]).arg(folder.path()).output().unwrap();
    let test: Value =
        store::read_json(&folder.path().join("quickstart/runs/1/small-bert/test/statistics.json")).unwrap();
    assert_eq!(json(output)["macro_f1"], test["macro_f1"]);
}

#[test]
fn a_run_does_not_go_on_from_another_base() {
    let folder = copy(&FINISHED);
    let base = folder.path().join("quickstart/runs/1/small-bert/model");
    let train = || {
        let mut command = quickstart(folder.path());
        command.args(["--stop-after", "train", "--set", "train.max_steps=2", "--set"]);
        command.arg(format!("model.0.path={}", base.display())).output().unwrap()
    };
    assert!(train().status.success());
    let tokenizer = base.join("tokenizer.json");
    fs::write(&tokenizer, fs::read_to_string(&tokenizer).unwrap() + " ").unwrap();
    let output = train();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("small-bert/tokenizer.json"), "{stderr}");
}

#[test]
fn a_label_that_weighs_nothing_trains_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::open(&FINISHED.snapshot()).unwrap();
    let weights: Vec<_> =
        snapshot.labels().iter().map(|label| format!("{label} = {}", u8::from(label == "insurance"))).collect();
    let mut command = quickstart(folder.path());
    command.args(["--stop-after", "train", "--set", "train.batch_size=1", "--set", "train.max_steps=20", "--set"]);
    let output = command.arg(format!("train.class_weights={{ {} }}", weights.join(", "))).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_mistyped_config_key_names_the_nearest() {
    let output = kiln().args(["check", "--set", "model.0.config.hiden_size=64"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("\"hiden_size\"") && stderr.contains("\"hidden_size\""), "{stderr}");
}

#[test]
fn training_stops_early_where_nothing_is_gained() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = quickstart(folder.path());
    command.args(["--stop-after", "train", "--set", "train.eval_steps=3", "--set", "train.early_stopping_patience=2"]);
    let output = command.args(["--set", "train.learning_rate=1e-12"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = String::from_utf8(output.stdout).unwrap();
    let steps: Vec<_> = stdout.lines().filter_map(|line| line.split("step=").nth(1)?.split(' ').next()).collect();
    assert_eq!(steps, ["3", "6", "9"], "the first is the best, and two more gain nothing");
}

#[test]
fn what_is_frozen_keeps_its_bits() {
    let folder = copy(&FINISHED);
    let mut command = quickstart(folder.path());
    command.args(["--stop-after", "train", "--set", "train.max_steps=3", "--set", "train.freeze=['bert.']"]);
    let output = command.args(["--set", "train.init_from=quickstart/1/small-bert"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let weights = |number: u32| {
        let file = folder.path().join(format!("quickstart/runs/{number}/small-bert/model/model.safetensors"));
        candle_core::safetensors::load(file, &candle_core::Device::Cpu).unwrap()
    };
    let (before, after) = (weights(1), weights(2));
    for (name, tensor) in &before {
        let bits = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bits(tensor) == bits(&after[name]), name.starts_with("bert."), "{name}");
    }
}

#[test]
fn every_experiment_file_is_valid() {
    for entry in fs::read_dir(crate::support::repository("experiments")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            Config::load(Some(&path), &Overrides::default()).unwrap_or_else(|error| panic!("{error:#}"));
        }
    }
}
