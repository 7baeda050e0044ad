//! Snapshots as Python's own libraries read them, and real corpora as kiln reads them.

use std::path::Path;
use std::process::Command;

use kiln::config::{Data, Format, Source, Split};
use kiln::data::{Encoding, Part, Snapshot, Tokenizer, encode_texts, prepare};
use kiln::store::read_json;
use kiln_models::TokenizerKind;
use serde_json::{Value, json};

use crate::support::{self, fetched, repository};

fn data(source: Source) -> Data {
    Data {
        source,
        format: Format::Auto,
        text: "text".into(),
        text_pair: None,
        label: "label".into(),
        id: None,
        split: Split { validation: 0.1, test: 0.2, seed: 42 },
    }
}

/// What a Python script prints, as JSON; `None` after saying aloud that the test is skipped.
fn python(arguments: &[&str]) -> Option<Value> {
    let python = support::python()?;
    let output = Command::new(python).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

const INPUTS: [&str; 3] = ["input_ids", "token_type_ids", "attention_mask"];

fn sample(folder: &Path) -> (Snapshot, Encoding) {
    let snapshot = prepare(&data(Source::Sample), folder).unwrap();
    let tokenizer = snapshot.scratch_tokenizer(TokenizerKind::WordPiece, 1000).unwrap();
    let encoding = snapshot.encode(&tokenizer, 128, &INPUTS, &Part::ALL, 2).unwrap();
    (snapshot, encoding)
}

#[test]
fn encodings_open_in_datasets() {
    let folder = tempfile::tempdir().unwrap();
    let (snapshot, encoding) = sample(folder.path());
    let folders = Part::ALL.map(|part| encoding.dir(part).unwrap().display().to_string());
    let script = repository("tests/python/load_dataset.py").display().to_string();
    let Some(seen) = python(&[&script, &folders[0], &folders[1], &folders[2]]) else { return };
    for (part, seen) in Part::ALL.into_iter().zip(seen.as_array().unwrap()) {
        let dataset = encoding.dataset(part).unwrap();
        let row = |i: usize| {
            json!({
                "input_ids": dataset.input_ids(i),
                "token_type_ids": dataset.token_type_ids(i),
                "attention_mask": vec![1; dataset.length(i)],
                "labels": dataset.label(i),
            })
        };
        let sum: i64 = (0..dataset.len())
            .map(|i| {
                let ids: i64 = dataset.input_ids(i).iter().map(|&id| i64::from(id)).sum();
                let types: i64 = dataset.token_type_ids(i).unwrap().iter().map(|&id| i64::from(id)).sum();
                ids + types + dataset.length(i) as i64 + i64::from(dataset.label(i).unwrap())
            })
            .sum();
        assert_eq!(seen["num_rows"], dataset.len());
        assert_eq!(seen["columns"], json!(["input_ids", "token_type_ids", "attention_mask", "labels"]));
        assert_eq!(
            seen["features"],
            json!({
                "input_ids": "list<int32>", "token_type_ids": "list<int8>", "attention_mask": "list<int8>", "labels": "int64",
            })
        );
        assert_eq!((&seen["first"], &seen["last"]), (&row(0), &row(dataset.len() - 1)));
        assert_eq!(seen["checksum"], sum);
    }
    let names =
        "import sys, json, datasets; print(json.dumps(datasets.load_from_disk(sys.argv[1]).features['labels'].names))";
    assert_eq!(python(&["-c", names, &folders[0]]).unwrap(), json!(snapshot.labels()));
}

#[test]
fn a_tokenizers_ids_are_pythons() {
    for (kind, pad_id) in [("wordpiece", 0), ("bytebpe", 1), ("unigram", 1)] {
        let (golden, folder) = (repository("tests/golden/tokenizers"), tempfile::tempdir().unwrap());
        std::fs::copy(golden.join(format!("{kind}.json")), folder.path().join("tokenizer.json")).unwrap();
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        let expected: Value = read_json(&golden.join(format!("{kind}.expected.json"))).unwrap();
        let expected = expected.as_array().unwrap();
        let texts: Vec<_> = expected.iter().map(|row| (row["text"].as_str().unwrap(), None)).collect();
        let encoded = encode_texts(&tokenizer, &texts, 512, 1).unwrap();
        for (row, encoded) in expected.iter().zip(&encoded) {
            assert_eq!(row["ids"], json!(encoded.input_ids), "{kind}: {}", row["text"]);
        }
        assert_eq!((tokenizer.vocab_size(), tokenizer.pad_id()), (2000, pad_id), "{kind}");
    }
}

#[test]
fn a_trained_tokenizer_opens_in_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let (snapshot, encoding) = sample(folder.path());
    let tokenizer = snapshot.scratch_tokenizer(TokenizerKind::WordPiece, 1000).unwrap();
    let tokenizer = tokenizer.of(&kiln_models::bert::ARCHITECTURE, 512).unwrap();
    tokenizer.save(folder.path()).unwrap();
    let texts: Vec<String> = snapshot.rows(Part::Test).unwrap().into_iter().take(20).map(|row| row.text).collect();
    std::fs::write(folder.path().join("texts.json"), json!(texts).to_string()).unwrap();
    let encode = "import sys, json, transformers
folder = sys.argv[1]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
texts = json.load(open(folder + '/texts.json'))
print(json.dumps([tokenizer(texts, truncation=True, max_length=128)['input_ids'], tokenizer.pad_token_id]))";
    let Some(seen) = python(&["-c", encode, &folder.path().display().to_string()]) else { return };
    let dataset = encoding.dataset(Part::Test).unwrap();
    let ids: Vec<&[i32]> = (0..texts.len()).map(|i| dataset.input_ids(i)).collect();
    assert_eq!(seen, json!([ids, tokenizer.pad_id()]));
}

#[test]
fn bbc_is_split_without_its_duplicates() {
    let Some(bbc) = fetched("bbc") else { return };
    let folder = tempfile::tempdir().unwrap();
    let snapshot = prepare(&data(Source::Path(bbc)), folder.path()).unwrap();
    assert_eq!(snapshot.labels(), ["business", "entertainment", "politics", "sports", "tech"]);
    assert_eq!(snapshot.card().duplicates.repeated, 98);
    let rows: Vec<usize> = Part::ALL.iter().map(|part| snapshot.rows(*part).unwrap().len()).collect();
    assert_eq!(rows.iter().sum::<usize>(), 2127);
    assert!(rows[1].abs_diff(213) <= 3 && rows[2].abs_diff(425) <= 3, "{rows:?}");
}

#[test]
fn r52_keeps_its_test_part_and_its_rare_labels() {
    let Some(r52) = fetched("r52") else { return };
    let folder = tempfile::tempdir().unwrap();
    let source = Source::Parts { train: r52.join("train.csv"), validation: None, test: Some(r52.join("test.csv")) };
    let snapshot = prepare(&data(source), folder.path()).unwrap();
    assert_eq!(snapshot.labels().len(), 52);
    assert_eq!(snapshot.rows(Part::Test).unwrap().len(), 2568);
    let duplicates = &snapshot.card().duplicates;
    assert_eq!((duplicates.held_out, duplicates.conflicts.len(), duplicates.kept), (8, 4, 15));
    let train = &snapshot.card().parts["train"].labels;
    assert!(train.values().all(|rows| rows.as_u64() >= Some(1)));
}
