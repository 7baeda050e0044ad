//! The files of a run, of its data, and of its checkpoints.

use std::fs;
use std::path::{Path, PathBuf};

use super::{RUN, TRAIN, Table, words};
use crate::hostile::command;

fn path(file: &str) -> String {
    format!("{RUN}/{file}")
}

pub(super) fn runs(table: &mut Table) {
    const INFER: &str = "infer hostile/1";
    let garbage = |_: &[u8]| b"{\"a\": [1, ".to_vec();
    let half = |whole: &[u8]| whole[..whole.len() / 2].to_vec();
    table.file("kiln-runs/hostile/runs/1/run.json", "garbage", INFER, (1, &["runs/1/run.json"]), garbage);
    table.file(
        "kiln-runs/hostile/runs/1/run.json",
        "another status",
        INFER,
        (1, &["runs/1/run.json", "unknown variant `done`"]),
        |whole| String::from_utf8(whole.to_vec()).unwrap().replace("\"finished\"", "\"done\"").into_bytes(),
    );
    table.file("kiln-runs/hostile/runs/1/run.json", "garbage, on the way to the next", TRAIN, (0, &[]), garbage);
    table.file("kiln-runs/hostile/runs/1/lock.json", "cut", INFER, (1, &["runs/1/lock.json"]), half);
    table.file(
        "kiln-runs/hostile/runs/1/lock.json",
        "cut, made again",
        "repro hostile/1",
        (1, &["runs/1/lock.json"]),
        half,
    );
    table.file(
        "kiln-runs/hostile/runs/1/experiment.toml",
        "garbage",
        INFER,
        (2, &["runs/1/experiment.toml:1:"]),
        garbage,
    );
    table.file(
        "kiln-runs/hostile/runs/1/a/metrics.jsonl",
        "garbage",
        "repro hostile/1",
        (1, &["a/metrics.jsonl line 1 is no event"]),
        |_| b"garbage\n".to_vec(),
    );
    table.file(
        "kiln-runs/hostile/runs/1/a/statistics.json",
        "cut",
        "compare hostile/1",
        (1, &["a/statistics.json"]),
        half,
    );
    table.file(
        "kiln-runs/hostile/runs/1/b/test/statistics.json",
        "a number for a list",
        "compare hostile/1",
        (1, &["b/test/statistics.json"]),
        |whole| {
            String::from_utf8(whole.to_vec()).unwrap().replace("\"labels\": [", "\"labels\": 7, \"l\": [").into_bytes()
        },
    );
    table.file(
        "kiln-runs/hostile/runs/1/b/test/predictions.parquet",
        "cut",
        "compare hostile/1",
        (1, &["b/test/predictions.parquet"]),
        half,
    );
    table.file(
        "kiln-runs/hostile/runs/1/b/test/predictions.parquet",
        "garbage",
        "compare hostile/1",
        (1, &["b/test/predictions.parquet"]),
        garbage,
    );
    table.add("predictions.parquet: of other rows", &[1, 2], &["b/test"], |folder| {
        let rows = "id,text\n1,a\n2,b\n";
        fs::write(folder.join("new.csv"), rows).unwrap();
        let output = format!("{RUN}/b/test/predictions.parquet");
        let infer = ["infer", "hostile/1", "--model", "b", "--input", "new.csv", "--output", &output];
        assert!(command(folder, &infer).output().unwrap().status.success());
        fs::remove_file(folder.join("new.csv")).unwrap();
        words("compare hostile/1")
    });
    table.add("test/: gone", &[2], &["model \"b\" of hostile/1 is not tested yet"], |folder| {
        fs::remove_dir_all(folder.join(path("b/test"))).unwrap();
        words("compare hostile/1")
    });
    for (name, file, run, code, says, bytes) in [
        ("garbage", "snapshot.json", INFER, 1, "snapshot.json", &b"{"[..]),
        ("no ids", "id2label.json", INFER, 2, "id2label.json: the ids do not count from 0", br#"{"1": "a", "3": "b"}"#),
        ("garbage", "id2label.json", INFER, 1, "id2label.json", b"[]"),
        ("garbage", "card.json", INFER, 1, "card.json", b"7"),
        ("garbage", "test/rows.parquet", INFER, 1, "test/rows.parquet", b"PAR1PAR1"),
        ("empty", "test/rows.parquet", INFER, 1, "test/rows.parquet", b""),
        ("garbage", "training/validation/rows.parquet", "export hostile/1", 1, "", b"garbage"),
    ] {
        let codes = if says.is_empty() { vec![0, code] } else { vec![code] };
        table.add(format!("snapshot: {file}: {name}"), &codes, &[says], move |folder| {
            fs::write(snapshot(folder).join(file), bytes).unwrap();
            words(run)
        });
    }
    table.add("snapshot: gone", &[2], &["is no prepared snapshot"], |folder| {
        fs::remove_dir_all(snapshot(folder)).unwrap();
        words(INFER)
    });
    table.add("--data: no snapshot", &[2], &["base is no prepared snapshot"], |_| {
        words("train experiment.toml --data base")
    });
    for (name, change) in [("cut", half as fn(&[u8]) -> Vec<u8>), ("garbage", garbage)] {
        table.add(
            format!("encoding: {name}"),
            &[1],
            &[".arrow is broken; delete its folder and prepare again"],
            move |folder| {
                let arrow = encoding(folder).join("data-00000-of-00001.arrow");
                let bytes = fs::read(&arrow).unwrap();
                fs::write(&arrow, change(&bytes)).unwrap();
                words(INFER)
            },
        );
    }
    table.add("encoding: its card is gone", &[1], &["card.json"], |folder| {
        fs::remove_file(encoding(folder).join("card.json")).unwrap();
        words(INFER)
    });
    table.add("encoding: its state is garbage", &[1], &["state.json"], |folder| {
        fs::write(encoding(folder).join("state.json"), "{").unwrap();
        words(INFER)
    });
    table.add("encoding: its state names nothing", &[1], &["its card.json says"], |folder| {
        fs::write(encoding(folder).join("state.json"), "{}").unwrap();
        words(INFER)
    });
    table.add("run: not there", &[2], &["no run \"hostile/9\"", "there are hostile/1"], |_| words("infer hostile/9"));
    table.add("run: a number that is none", &[2], &["no run \"hostile/x\""], |_| words("infer hostile/x"));
    table.add("run: a model that it has not", &[2], &["has no model \"c\"; it has a, b"], |_| {
        words("infer hostile/1 --model c")
    });
    table.add("run: the highest number there is", &[2], &["4294967295"], |folder| {
        fs::create_dir(folder.join("kiln-runs/hostile/runs/4294967295")).unwrap();
        words(TRAIN)
    });
    table.add("run: finished", &[2], &["hostile/1 is finished"], |_| words("train experiment.toml --resume hostile/1"));
    table.add("run: its lock is a folder", &[1], &["runs/1/.lock"], |folder| {
        let _ = fs::remove_file(folder.join(path(".lock")));
        fs::create_dir(folder.join(path(".lock"))).unwrap();
        words(INFER)
    });
    table.add("sample: more than there can be", &[1, 2], &[], |_| {
        words("sample --output s.csv --count 18446744073709551615")
    });
}

fn snapshot(folder: &Path) -> PathBuf {
    let mut entries = fs::read_dir(folder.join("kiln-runs/hostile/data")).unwrap();
    entries.next().unwrap().unwrap().path()
}

/// The test part's encoding.
fn encoding(folder: &Path) -> PathBuf {
    let entries = fs::read_dir(snapshot(folder).join("test")).unwrap();
    entries.map(|entry| entry.unwrap().path()).find(|path| path.join("card.json").exists()).unwrap()
}

pub(super) fn onnx(table: &mut Table) {
    const FILE: &str = "kiln-runs/hostile/runs/1/a/model.onnx";
    const INFER: &str = "infer hostile/1 --model a";
    let says: (i32, &[&'static str]) = (1, &["a/model.onnx"]);
    table.file(FILE, "empty", INFER, says, |_| Vec::new());
    table.file(FILE, "cut", INFER, says, |whole| whole[..whole.len() / 2].to_vec());
    table.file(FILE, "garbage", INFER, says, |_| b"garbage".repeat(100));
    table.file(FILE, "zeros", INFER, says, |whole| vec![0; whole.len()]);
    table.file(FILE, "labels that are no JSON", INFER, (1, &["a/model.onnx", "id2label"]), |whole| {
        replaced(whole, b"{\"0\":\"label 0\"", b"{\"0\":\"label 0,")
    });
    table.file(FILE, "labels that do not count from 0", INFER, (1, &["a/model.onnx", "id2label"]), |whole| {
        replaced(whole, b"{\"0\":\"label 0\"", b"{\"7\":\"label 0\"")
    });
    table.file(FILE, "other labels", INFER, (2, &["model \"a\" knows the labels label x"]), |whole| {
        replaced(whole, b"{\"0\":\"label 0\"", b"{\"0\":\"label x\"")
    });
    table.file(FILE, "an input by another name", INFER, (1, &["a/model.onnx", "input_idz"]), |whole| {
        replaced(whole, b"input_ids", b"input_idz")
    });
    table.add("model.onnx: a folder", &[2], &["a/model.onnx is not there"], |folder| {
        fs::remove_file(folder.join(FILE)).unwrap();
        fs::create_dir(folder.join(FILE)).unwrap();
        words(INFER)
    });
    table.add("model/: its weights are cut", &[1, 2], &["a/model/model.safetensors"], |folder| {
        let weights = folder.join(path("a/model/model.safetensors"));
        let bytes = fs::read(&weights).unwrap();
        fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
        words("export hostile/1 --model a")
    });
}

/// Every `from` become `to`, which is as long.
fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let places: Vec<usize> = (0..bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from)).collect();
    assert!(!places.is_empty(), "{:?}", String::from_utf8_lossy(from));
    places.iter().for_each(|&place| bytes[place..place + to.len()].copy_from_slice(to));
    bytes
}

/// The run of first.toml, become one that is to go on from its last checkpoint.
pub(super) const FIRST: &str = "first/hostile/runs/1";
pub(super) const RESUME: &str = "train first.toml --stop-after train --root first";

pub(super) fn unfinished(folder: &Path) {
    let record = folder.join(FIRST).join("run.json");
    let text = fs::read_to_string(&record).unwrap().replace("\"stopped\"", "\"interrupted\"");
    fs::write(&record, text).unwrap();
    fs::remove_file(folder.join(FIRST).join("base/statistics.json")).unwrap();
}

pub(super) fn checkpoints(table: &mut Table) {
    for (name, file, change, says) in [
        ("cut", "model.safetensors", cut as fn(&[u8]) -> Vec<u8>, "base/checkpoints/2/model.safetensors"),
        ("empty", "model.safetensors", empty, "base/checkpoints/2/model.safetensors"),
        ("cut", "optimizer.safetensors", cut, "base/checkpoints/2/optimizer.safetensors"),
        ("empty", "optimizer.safetensors", empty, "base/checkpoints/2/optimizer.safetensors"),
        ("cut", "state.json", cut, "base/checkpoints/2/state.json"),
        (
            "of another step",
            "state.json",
            |_| {
                br#"{"step": 18446744073709551615, "best": null, "evaluations_without_gain": 0, "loss_sum": 0.0, "loss_weight": 0.0, "stopped_early": false}"#.to_vec()
            },
            "base/checkpoints/2/state.json",
        ),
        (
            "a best that is not there",
            "state.json",
            |_| {
                br#"{"step": 2, "best": {"step": 77, "value": 0.5}, "evaluations_without_gain": 0, "loss_sum": 0.0, "loss_weight": 0.0, "stopped_early": false}"#.to_vec()
            },
            "base/checkpoints/77",
        ),
    ] {
        table.add(format!("checkpoint: {file}: {name}"), &[1, 2], &[says], move |folder| {
            unfinished(folder);
            let path = folder.join(FIRST).join("base/checkpoints/2").join(file);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, change(&bytes)).unwrap();
            words(RESUME)
        });
    }
    table.add("checkpoint: an empty folder", &[1, 2], &["base/checkpoints/7/"], |folder| {
        unfinished(folder);
        fs::create_dir(folder.join(FIRST).join("base/checkpoints/7")).unwrap();
        words(RESUME)
    });
    table.add("checkpoint: metrics of garbage", &[1], &["base/metrics.jsonl line 1 is no event"], |folder| {
        unfinished(folder);
        fs::write(folder.join(FIRST).join("base/metrics.jsonl"), "garbage\n").unwrap();
        words(RESUME)
    });
}

fn cut(whole: &[u8]) -> Vec<u8> {
    whole[..whole.len() * 2 / 3].to_vec()
}

fn empty(_: &[u8]) -> Vec<u8> {
    Vec::new()
}
