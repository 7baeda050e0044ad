//! Models side by side, and their probabilities calibrated, by the real binary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::LazyLock;

use kiln::data::{Part, Snapshot};
use kiln::export::onnx;
use kiln::metrics::{Statistics, mcnemar};
use kiln::report::{Comparison, Verdict, read_predictions};
use kiln::store;
use serde_json::{Value, json};

use crate::support::kiln;

const EXPERIMENT: &str = r#"
name = "two"
[data]
source = "sample"
max_length = 160
[[model]]
name = "small"
architecture = "bert"
config = { hidden_size = 32, num_hidden_layers = 1, num_attention_heads = 2, intermediate_size = 64 }
tokenizer = { vocab_size = 2000 }
max_length = 64
[[model]]
name = "wider"
architecture = "bert"
config = { hidden_size = 64, num_hidden_layers = 2, num_attention_heads = 2, intermediate_size = 128 }
tokenizer = { vocab_size = 3000 }
[train]
max_steps = 160
batch_size = 16
learning_rate = 2e-3
eval_steps = 80
"#;

/// A run of two models.
struct Run {
    folder: tempfile::TempDir,
    stdout: String,
}

static RUN: LazyLock<Run> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("two.toml"), EXPERIMENT).unwrap();
    let output = train(folder.path(), &[]);
    Run { stdout: succeeded(&output), folder }
});

fn train(folder: &Path, options: &[&str]) -> Output {
    let mut command = kiln();
    command.arg("train").arg(folder.join("two.toml")).arg("--root").arg(folder.join("runs")).args(options);
    command.output().unwrap()
}

/// `kiln VERB … --root …`
fn call(folder: &Path, arguments: &[&str]) -> Output {
    kiln().args(arguments).arg("--root").arg(folder.join("runs")).output().unwrap()
}

fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What a call that the user can put right says.
fn refused(output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    stderr
}

fn run(folder: &Path, number: u32) -> PathBuf {
    folder.join("runs/two/runs").join(number.to_string())
}

/// A folder with a copy of the run, to add to it or to spoil it.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let status = std::process::Command::new("cp").arg("-r").arg(RUN.folder.path()).arg(folder.path()).status();
    assert!(status.unwrap().success());
    fs::rename(folder.path().join(RUN.folder.path().file_name().unwrap()), folder.path().join("copy")).unwrap();
    folder
}

#[test]
fn a_run_of_two_models_is_compared() {
    let (folder, dir) = (RUN.folder.path(), run(RUN.folder.path(), 1));
    let comparison: Comparison = store::read_json(&dir.join("comparison.json")).unwrap();
    let record: Value = store::read_json(&dir.join("run.json")).unwrap();
    assert_eq!(record["snapshot"], comparison.snapshot.as_str());
    let names: Vec<&str> = comparison.models.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["small", "wider"]);

    let snapshot = Snapshot::open(&folder.join("runs/two/data").join(&comparison.snapshot)).unwrap();
    let rows = snapshot.rows(Part::Test).unwrap();
    let predicted = ["small", "wider"].map(|name| {
        let (_, model) = comparison.models.iter().find(|(have, _)| have == name).unwrap();
        let validation: Statistics = store::read_json(&dir.join(name).join("statistics.json")).unwrap();
        let mut test: Statistics = store::read_json(&dir.join(name).join("test/statistics.json")).unwrap();
        assert!(validation.training_seconds.unwrap() > 0.0);
        test.training_seconds = validation.training_seconds;
        assert_eq!(model.statistics, test);
        assert_eq!((model.validation, model.run.as_str()), (validation.macro_f1, "two/1"));
        assert_eq!(model.bytes, fs::metadata(dir.join(name).join("model.onnx")).unwrap().len());
        // Each has its own tokenizer and length, and all have the same rows.
        let predicted = read_predictions(&dir.join(name).join("test/predictions.parquet")).unwrap();
        assert!(predicted.iter().map(|p| (&p.id, &p.label)).eq(rows.iter().map(|row| (&row.id, &row.label))));
        predicted
    });
    let [small, wider] = [&comparison.models[0].1, &comparison.models[1].1];
    assert_eq!(comparison.best, if wider.validation > small.validation { "wider" } else { "small" });

    let [pair] = comparison.pairs.as_slice() else { panic!("{:?}", comparison.pairs) };
    assert_eq!((pair.a.as_str(), pair.b.as_str()), ("small", "wider"));
    assert_eq!(pair.f1_difference, small.statistics.macro_f1 - wider.statistics.macro_f1);
    assert!(pair.interval[0] < pair.f1_difference && pair.f1_difference < pair.interval[1], "{pair:?}");
    assert_eq!(pair.verdict, Verdict::of(pair.interval));
    assert_eq!(pair.mcnemar_p, mcnemar(pair.only_a_correct, pair.only_b_correct));
    let right = |model: usize, i: usize| Some(&predicted[model][i].prediction) == rows[i].label.as_ref();
    let only_a = (0..rows.len()).filter(|&i| right(0, i) && !right(1, i)).count() as u64;
    assert_eq!(pair.only_a_correct, only_a);

    // Every row that they disagree on, with its text and both predictions.
    let mut disagreements = comparison.disagreements.iter();
    for (i, row) in rows.iter().enumerate() {
        let [small, wider] = [&predicted[0][i], &predicted[1][i]];
        if small.prediction == wider.prediction {
            continue;
        }
        let said = disagreements.next().unwrap();
        assert_eq!((&said.id, &said.text, Some(&said.label)), (&row.id, &row.text, row.label.as_ref()));
        assert_eq!((said.predictions[0].0.as_str(), &said.predictions[0].1.prediction), ("small", &small.prediction));
        let highest = wider.probabilities.iter().copied().fold(0.0, f32::max);
        assert_eq!(
            (&said.predictions[1].1.prediction, said.predictions[1].1.probability),
            (&wider.prediction, highest)
        );
    }
    assert!(disagreements.next().is_none() && pair.disagreements == comparison.disagreements.len() as u64);
    assert!(pair.disagreements > 0, "models of other sizes after few steps");

    // The same again, to the byte: by itself, and on stdout.
    let before = fs::read(dir.join("comparison.json")).unwrap();
    let printed = succeeded(&call(folder, &["compare"]));
    assert!(RUN.stdout.ends_with(&printed), "{printed} does not end {}", RUN.stdout);
    let they = format!("they disagree on {} of {} rows: ", pair.disagreements, rows.len());
    assert!(printed.starts_with(' ') && printed.contains(&they) && printed.contains("small − wider: macro-F1 "));
    assert_eq!(succeeded(&call(folder, &["compare", "two/1", "--json"])).into_bytes(), before);
    assert_eq!(fs::read(dir.join("comparison.json")).unwrap(), before);
}

#[test]
fn runs_are_compared_in_a_run_of_its_own() {
    let copied = copy();
    let folder = copied.path().join("copy");
    let folder = folder.as_path();
    let stopped = train(folder, &["--new", "--stop-after", "export", "--set", "train.seed=7"]);
    succeeded(&stopped);
    let said = refused(&call(folder, &["compare", "two/1", "two/2"]));
    let tests = format!("kiln infer {}", run(folder, 2).display());
    assert!(said.contains("model \"small\" of two/2 is not tested yet: ") && said.contains(&tests), "{said}");
    succeeded(&kiln().arg("infer").arg(run(folder, 2)).output().unwrap());

    let printed = succeeded(&call(folder, &["compare", "two/1", "two/2"]));
    let file = run(folder, 3).join("comparison.json");
    assert!(printed.contains(&file.display().to_string()), "{printed}");
    let record: Value = store::read_json(&run(folder, 3).join("run.json")).unwrap();
    let names = ["two/1/small", "two/1/wider", "two/2/small", "two/2/wider"];
    assert_eq!((&record["job_type"], &record["status"]), (&json!("comparison"), &json!("finished")));
    assert_eq!(record["models"], json!(names));
    let comparison: Comparison = store::read_json(&file).unwrap();
    assert!(comparison.models.iter().map(|(name, _)| name.as_str()).eq(names));
    assert_eq!(comparison.pairs.len(), 6);
    let best = comparison.models.iter().map(|(_, model)| model.validation).fold(0.0, f64::max);
    assert_eq!(comparison.models.iter().find(|(_, model)| model.validation == best).unwrap().0, comparison.best);

    // It is shown again as it is, it has no models to run, and it is nobody's newest run.
    assert_eq!(succeeded(&call(folder, &["compare", "two/3"])), printed);
    let said = refused(&call(folder, &["infer", "two/3"]));
    assert!(said.contains("two/3 is a comparison"), "{said}");
    let said = refused(&call(folder, &["compare", "two/1", "two/3"]));
    assert!(said.contains("two/3 is a comparison of two/1/small, "), "{said}");
    assert!(succeeded(&call(folder, &["compare"])).contains("runs/2/comparison.json"));

    // Some of the models; names that are unlike stand for themselves.
    let chosen = json_of(&call(folder, &["compare", "two/1", "two/2", "--model", "small", "--json"]));
    assert_eq!(chosen["models"].as_object().unwrap().keys().collect::<Vec<_>>(), ["two/1/small", "two/2/small"]);
    assert!(run(folder, 4).join("comparison.json").is_file());
    let said = refused(&call(folder, &["compare", "two/1", "two/1"]));
    assert!(said.contains("two/1/small is there twice"), "{said}");
    let said = refused(&call(folder, &["compare", "two/1", "--model", "small"]));
    assert!(said.contains("a comparison needs two"), "{said}");
    let said = refused(&call(folder, &["compare", "two/1", "--model", "large"]));
    assert!(said.contains("no model large; it has small, wider"), "{said}");

    // Other rows.
    let other = ["--new", "--set", "data.split.seed=7", "--stop-after", "train", "--set", "train.max_steps=1"];
    succeeded(&train(folder, &other));
    let said = refused(&call(folder, &["compare", "two/1", "two/5"]));
    let snapshot =
        |number| store::read_json::<Value>(&run(folder, number).join("run.json")).unwrap()["snapshot"].clone();
    for part in [
        format!("two/1 is on snapshot {}", snapshot(1).as_str().unwrap()),
        format!("two/5 on snapshot {}", snapshot(5).as_str().unwrap()),
    ] {
        assert!(said.contains(&part), "{part} is not in {said}");
    }

    // A test that is not of these rows.
    let (test, others) = ("wider/test/predictions.parquet", run(folder, 2).join("wider/test/predictions.parquet"));
    fs::copy(others, run(folder, 1).join(test)).unwrap();
    let output = call(folder, &["compare", "two/1"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("are not of one test on snapshot") && said.contains("kiln infer"), "{said}");
}

fn json_of(output: &Output) -> Value {
    serde_json::from_str(&succeeded(output)).unwrap()
}

#[test]
fn a_model_has_a_temperature_and_is_calibrated_on_demand() {
    let copied = copy();
    let folder = copied.path().join("copy");
    let folder = folder.as_path();
    let dir = run(folder, 1).join("wider");
    let fitted: Value = store::read_json(&dir.join("model/calibration.json")).unwrap();
    let temperature = fitted["temperature"].as_f64().unwrap();
    assert!(temperature > 0.0 && temperature != 1.0, "{fitted}");
    assert!(fitted["nll_scaled"].as_f64() < fitted["nll"].as_f64(), "{fitted}");
    for part in ["statistics.json", "test/statistics.json"] {
        let statistics: Value = store::read_json(&dir.join(part)).unwrap();
        assert_eq!(statistics["temperature"], temperature);
        assert!(statistics["ece"].as_f64().unwrap() > 0.0 && statistics["ece_scaled"].as_f64().unwrap() > 0.0);
        let bins = statistics["reliability"].as_array().unwrap();
        let rows: u64 = bins.iter().map(|bin| bin["count"].as_u64().unwrap()).sum();
        assert_eq!((bins.len(), rows), (15, statistics["examples"].as_u64().unwrap()));
    }
    let statistics: Value = store::read_json(&dir.join("statistics.json")).unwrap();
    assert!((statistics["loss"].as_f64().unwrap() - fitted["nll"].as_f64().unwrap()).abs() < 1e-6);
    let metadata = onnx::read(&dir.join("model.onnx")).unwrap().metadata_props;
    let entry = metadata.iter().find(|entry| entry.key == "kiln.temperature").unwrap();
    assert_eq!(entry.value.parse::<f64>().unwrap(), temperature);

    let snapshot = store::read_json::<Value>(&run(folder, 1).join("run.json")).unwrap()["snapshot"].clone();
    let snapshot = Snapshot::open(&folder.join("runs/two/data").join(snapshot.as_str().unwrap())).unwrap();
    let rows = snapshot.rows(Part::Test).unwrap();
    let (input, output) = (folder.join("new.jsonl"), folder.join("new.parquet"));
    let lines: String = rows.iter().take(40).map(|row| format!("{}\n", json!({"text": row.text}))).collect();
    fs::write(&input, lines).unwrap();
    let infer = |options: &[&str]| {
        let files = ["--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()];
        call(folder, &[["infer", "two/1", "--model", "wider"].as_slice(), &files, options].concat())
    };
    succeeded(&infer(&[]));
    let plain = read_predictions(&output).unwrap();
    succeeded(&infer(&["--calibrated"]));
    let calibrated = read_predictions(&output).unwrap();
    assert_eq!((plain.len(), calibrated.len()), (40, 40));
    for (plain, calibrated) in plain.iter().zip(&calibrated) {
        assert_eq!(plain.prediction, calibrated.prediction);
        let powers: Vec<f64> = plain.probabilities.iter().map(|&p| f64::from(p).powf(1.0 / temperature)).collect();
        let sum: f64 = powers.iter().sum();
        for (power, &got) in powers.iter().zip(&calibrated.probabilities) {
            assert!((power / sum - f64::from(got)).abs() < 1e-5, "{got} for {}", power / sum);
        }
    }

    // The test part too, and what is counted of it stays.
    let read = || read_predictions(&dir.join("test/predictions.parquet")).unwrap();
    let (before, first) = (store::read_json::<Value>(&dir.join("test/statistics.json")).unwrap(), read());
    succeeded(&call(folder, &["infer", "two/1", "--calibrated"]));
    let (after, second) = (store::read_json::<Value>(&dir.join("test/statistics.json")).unwrap(), read());
    assert_eq!((&before["loss"], &before["ece"]), (&after["loss"], &after["ece"]));
    assert_ne!(first[0].probabilities, second[0].probabilities);
    for (second, calibrated) in second.iter().zip(&calibrated) {
        // In other batches sums are made in another order.
        let mut pairs = second.probabilities.iter().zip(&calibrated.probabilities);
        assert!(pairs.all(|(a, b)| (a - b).abs() < 1e-5), "{second:?} {calibrated:?}");
    }

    // A model without one, as of an earlier kiln.
    fs::remove_file(dir.join("model/calibration.json")).unwrap();
    succeeded(&call(folder, &["export", "two/1", "--model", "wider"]));
    let said = refused(&infer(&["--calibrated"]));
    assert!(said.contains("\"wider\" has no temperature") && said.contains("leave out --calibrated"), "{said}");
    succeeded(&infer(&[]));
    succeeded(&call(folder, &["infer", "two/1"]));
    let statistics: Value = store::read_json(&dir.join("test/statistics.json")).unwrap();
    assert!(statistics["ece"].is_f64() && statistics.get("temperature").is_none(), "{statistics}");
}
