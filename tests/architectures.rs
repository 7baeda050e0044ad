//! Every architecture the whole way, by the real binary: pairs of texts in, a tested ONNX classifier out, and what
//! transformers makes of its folder.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::LazyLock;

use kiln::data::{Dataset, Example, Tokenizer, encode_texts, sample};
use kiln::export;
use kiln::infer::runtime;
use kiln::pretrained::Classifier;
use kiln::store;
use kiln_models::{ARCHITECTURES, Architecture, Config};
use serde_json::{Value, json};

use crate::support::{kiln, python};

const LAYERS: usize = 3;
const POSITIONS: usize = 50;

/// One short run with a small model of each architecture, all from scratch.
static FINISHED: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let rows = sample::documents(1, 300).into_iter().map(|row| {
        let words: Vec<&str> = row.text.split(' ').collect();
        let (text, reply) = words.split_at(words.len().min(80) / 2);
        format!("{}\n", json!({ "text": text.join(" "), "reply": reply.join(" "), "label": row.label }))
    });
    fs::write(folder.path().join("rows.jsonl"), rows.collect::<String>()).unwrap();
    let models = ARCHITECTURES.iter().map(|architecture| {
        let (name, config) = (architecture.model_type, Value::from(config(architecture)));
        format!(
            "[[model]]\nname = {name:?}\narchitecture = {name:?}\ntokenizer = {{ vocab_size = 700 }}\nconfig = {}\n",
            toml(&config)
        )
    });
    let experiment = format!(
        "name = \"all\"\n[data]\nsource = \"rows.jsonl\"\ntext_pair = \"reply\"\nmax_length = 48\n\
         [train]\nmax_steps = 6\nbatch_size = 16\nlearning_rate = 1e-3\n{}",
        models.collect::<String>()
    );
    fs::write(folder.path().join("all.toml"), experiment).unwrap();
    let output = run(&["train", &folder.path().join("all.toml").display().to_string()], &folder);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    folder
});

/// A small one, by the names that the architecture has for the sizes.
fn config(architecture: &Architecture) -> Config {
    let sizes = [
        (["hidden_size", "dim"], 32),
        (["num_hidden_layers", "n_layers"], LAYERS),
        (["num_attention_heads", "n_heads"], 2),
        (["intermediate_size", "hidden_dim"], 64),
        (["embedding_size", "embedding_size"], 16),
        (["max_position_embeddings", "max_position_embeddings"], POSITIONS),
    ];
    let known = (architecture.config_keys)();
    let sizes = sizes.into_iter().flat_map(|(keys, size)| keys.map(|key| (key.to_owned(), size.into())));
    let mut config: Config = sizes.filter(|(key, _)| known.contains(key)).collect();
    config.insert("initializer_range".into(), 0.2.into()); // logits that differ from row to row
    config
}

/// A table on one line.
fn toml(table: &Value) -> String {
    let entries = table.as_object().unwrap().iter().map(|(key, value)| format!("{key} = {value}"));
    format!("{{ {} }}", entries.collect::<Vec<_>>().join(", "))
}

fn run(arguments: &[&str], root: &tempfile::TempDir) -> Output {
    kiln().args(arguments).arg("--root").arg(root.path()).output().unwrap()
}

fn folder(architecture: &Architecture) -> PathBuf {
    FINISHED.path().join("all/runs/1").join(architecture.model_type)
}

/// The test part, as the model read it.
fn encoded(architecture: &Architecture) -> Dataset {
    let record: Value = store::read_json(&FINISHED.path().join("all/runs/1/run.json")).unwrap();
    let test = FINISHED.path().join("all/data").join(record["snapshot"].as_str().unwrap()).join("test");
    let tokenizer = Tokenizer::from_folder(&folder(architecture).join("model")).unwrap();
    let folders = fs::read_dir(test).unwrap().map(|entry| entry.unwrap().path());
    let mut of_this = folders.filter(|folder| {
        store::read_json::<Value>(&folder.join("card.json"))
            .is_ok_and(|card| card["tokenizer"] == tokenizer.hash() && card["inputs"] == json!(architecture.inputs))
    });
    Dataset::open(&of_this.next().unwrap()).unwrap()
}

#[test]
fn each_is_trained_exported_and_tested() {
    for architecture in ARCHITECTURES {
        let folder = folder(architecture);
        for file in ["export.json", "test/certificate.json"] {
            let certificate: Value = store::read_json(&folder.join(file)).unwrap();
            assert!(certificate["max_abs_diff"].as_f64().unwrap() <= 1e-4, "{certificate}");
            assert_eq!(certificate["argmax_flips"], 0);
        }
        let classifier = Classifier::load(&folder.join("model")).unwrap();
        assert_eq!(classifier.input_names(), architecture.inputs);
        let graph: Vec<_> = classifier.graph().unwrap().inputs.into_iter().map(|input| input.name).collect();
        assert_eq!(graph, architecture.inputs);
        let dataset = encoded(architecture);
        let typed = architecture.inputs.contains(&"token_type_ids");
        assert_eq!(dataset.token_type_ids(0).map(|types| types.contains(&1)), typed.then_some(true));
    }
}

#[test]
fn onnx_runtime_fuses_the_layers_of_each() {
    let runtime = runtime::ensure(false).unwrap();
    for architecture in ARCHITECTURES {
        let ops = export::optimized_ops(runtime, &folder(architecture).join("model.onnx")).unwrap();
        // The last layer asks for the first tokens alone, and a layer that does not begin at a norm, as ELECTRA's first
        // after its projection, stays as it is: there is no fused form of either.
        let plain = if config(architecture).contains_key("embedding_size") { 2 } else { 1 };
        let attention = (ops.get("Attention").copied(), ops.get("Softmax").copied());
        assert_eq!(attention, (Some(LAYERS - plain), Some(plain)), "{}: {ops:?}", architecture.model_type);
        assert_eq!(ops.get("LayerNormalization"), Some(&(1 + 2 * LAYERS)), "{}: {ops:?}", architecture.model_type);
        for unfused in ["Erf", "ReduceMean"] {
            assert_eq!(ops.get(unfused), None, "{}: {ops:?}", architecture.model_type);
        }
    }
}

#[test]
fn transformers_loads_each_to_the_same_logits_and_ids() {
    let Some(python) = python() else { return };
    let mut command = Command::new(&python);
    command.arg("tests/python/load_model.py");
    let datasets: Vec<Dataset> = ARCHITECTURES.iter().map(|architecture| encoded(architecture)).collect();
    for (architecture, dataset) in ARCHITECTURES.iter().zip(&datasets) {
        let row = |example: Example<'_>| match example.token_type_ids {
            Some(types) => json!({ "input_ids": example.input_ids, "token_type_ids": types }),
            None => json!({ "input_ids": example.input_ids }),
        };
        let (model, rows) = (folder(architecture).join("model"), folder(architecture).join("rows.json"));
        fs::write(&rows, json!((0..4).map(|i| row(dataset.example(i))).collect::<Vec<_>>()).to_string()).unwrap();
        command.args([model, rows]);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    assert_eq!(lines.lines().count(), ARCHITECTURES.len());

    for ((architecture, dataset), line) in ARCHITECTURES.iter().zip(&datasets).zip(lines.lines()) {
        let loaded: Value = serde_json::from_str(line).unwrap();
        let model = folder(architecture).join("model");
        let classifier = Classifier::load(&model).unwrap();
        let examples: Vec<_> = (0..4).map(|i| dataset.example(i)).collect();
        let wanted = classifier.logits(&examples).unwrap().concat();
        let logits: Vec<Vec<f32>> = serde_json::from_value(loaded["logits"].clone()).unwrap();
        let difference = wanted.iter().zip(logits.concat()).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(difference < 2e-5, "{}: off by {difference:e}", architecture.model_type);
        assert_eq!(logits.len(), examples.len());
        assert_eq!(loaded["architecture"], architecture.class_name);
        assert_eq!((&loaded["missing_keys"], &loaded["unexpected_keys"]), (&json!([]), &json!([])));

        let tokenizer = Tokenizer::from_folder(&model).unwrap();
        let texts = [("Hello, world!", None), ("Hello, world!", Some("What's up?"))];
        let encoded = encode_texts(&tokenizer, &texts, 48, 1).unwrap();
        let mut inputs = architecture.inputs.to_vec();
        inputs.sort_unstable();
        assert_eq!(
            loaded["tokenizer"],
            json!({
                "class": architecture.tokenizer_class, "vocab_size": tokenizer.vocab_size(),
                "max_length": classifier.max_positions().unwrap(), "inputs": inputs,
                "hello": encoded[0].input_ids, "pair": encoded[1].input_ids,
            })
        );
    }
}

#[test]
fn each_is_fine_tuned_from_its_folder() {
    let root = tempfile::tempdir().unwrap();
    let file = FINISHED.path().join("all.toml").display().to_string();
    let mut command = kiln();
    command
        .args(["train", &file, "--stop-after", "train", "--set", "train.max_steps=1"])
        .arg("--root")
        .arg(root.path());
    command.args(["--set", "train.learning_rate=1e-12"]); // leaves the model as it was
    for (i, architecture) in ARCHITECTURES.iter().enumerate() {
        command.arg("--set").arg(format!("model.{i}.path={}", folder(architecture).join("model").display()));
    }
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    for architecture in ARCHITECTURES {
        let again = root.path().join("all/runs/1").join(architecture.model_type);
        let f1 =
            |folder: PathBuf| store::read_json::<Value>(&folder.join("statistics.json")).unwrap()["macro_f1"].clone();
        assert_eq!(f1(again.clone()), f1(folder(architecture)), "{}", architecture.model_type);
        for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"] {
            let read = |folder: PathBuf| fs::read_to_string(folder.join("model").join(file)).unwrap();
            assert_eq!(read(again.clone()), read(folder(architecture)), "{file}");
        }
    }
    assert!(!stderr.contains("; new: ") && !stderr.contains("; unused: "), "{stderr}");
}

#[test]
fn what_it_cannot_read_is_named_before_it_trains() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    assert!(
        Command::new("cp")
            .arg("-r")
            .arg(folder(ARCHITECTURES[0]).join("model"))
            .arg(&model)
            .status()
            .unwrap()
            .success()
    );
    let config: Config = store::read_json(&model.join("config.json")).unwrap();
    let check = |key: &str, value: Value| {
        let mut config = config.clone();
        config.insert(key.into(), value);
        store::write_json(&model.join("config.json"), &config).unwrap();
        let path = format!("model.0.path={}", model.display());
        let output = run(&["check", "--set", &path, "--set", "data.max_length=48"], &root);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        stderr
    };
    let stderr = check("model_type", "robertta".into());
    let known: Vec<_> = ARCHITECTURES.iter().map(|a| a.model_type).collect();
    assert!(stderr.contains(&format!("known are: {}; did you mean \"roberta\"?", known.join(", "))), "{stderr}");
    assert!(stderr.contains(&model.display().to_string()), "{stderr}");
    let stderr = check("hidden_act", "relu".into());
    assert!(stderr.contains("hidden_act = \"relu\" is not supported; \"gelu\" is"), "{stderr}");
}

#[test]
fn positions_that_are_reserved_are_not_used() {
    let path = FINISHED.path().join("all.toml").display().to_string();
    for (i, architecture) in ARCHITECTURES.iter().enumerate() {
        let set = format!("model.{i}.max_length={POSITIONS}");
        let output = run(&["check", &path, "--set", &set], &FINISHED);
        let stderr = String::from_utf8(output.stderr).unwrap();
        // RoBERTa's begin after the padding's, which is 1.
        if architecture.base_prefix == "roberta." {
            assert_eq!(output.status.code(), Some(2), "{stderr}");
            assert!(stderr.contains("max_length = 50, but it reads at most 48 tokens"), "{stderr}");
        } else {
            assert!(output.status.success(), "{stderr}");
        }
    }
}

#[test]
fn models_says_what_there_is() {
    let root = tempfile::tempdir().unwrap();
    let listed: Value = serde_json::from_slice(&run(&["models", "--json"], &root).stdout).unwrap();
    let text = String::from_utf8(run(&["models"], &root).stdout).unwrap();
    for (architecture, row) in ARCHITECTURES.iter().zip(listed.as_array().unwrap()) {
        assert_eq!(row["model_type"], architecture.model_type);
        assert_eq!(row["inputs"], json!(architecture.inputs));
        assert_eq!(row["from_scratch"]["tokenizer"], architecture.tokenizer.name());
        let line = text.lines().find(|line| line.split(' ').next() == Some(architecture.model_type)).unwrap();
        assert!(line.contains(architecture.class_name) && line.ends_with(&architecture.inputs.join(", ")), "{line}");
    }
    assert_eq!(listed.as_array().unwrap().len(), ARCHITECTURES.len());
}
