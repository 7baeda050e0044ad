//! What kiln itself reads of others, each as a function of bytes that gives nothing back: a value or an error,
//! and never a panic. Both the property tests and the fuzz targets come in here.

use std::io::Write as _;
use std::path::Path;

use kiln::config::{Config, Data, Format, Overrides, Source, Split};
use kiln::data::source;
use kiln::dist::World;
use kiln::export::onnx;
use kiln::metrics::Statistics;
use kiln::tensors::TensorFile;
use kiln::weights::Index;
use kiln::{store, track};

/// What takes bytes.
type Door = fn(&[u8]);

/// Each by its name.
pub const DOORS: [(&str, Door); 9] = [
    ("experiment", experiment),
    ("safetensors", safetensors),
    ("delimited", delimited),
    ("jsonl", jsonl),
    ("arrow", arrow),
    ("launcher", launcher),
    ("onnx", onnx),
    ("events", events),
    ("records", records),
];

/// Runs `read` on a file of these bytes, in memory where the system has such a place.
fn file(bytes: &[u8], ending: &str, read: impl FnOnce(&Path)) {
    let mut builder = tempfile::Builder::new();
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let mut file = builder.suffix(ending).tempfile_in(place).expect("a temporary file");
    file.write_all(bytes).expect("to write it");
    read(file.path());
}

/// An experiment file; a line `--set …` of it is an option.
pub fn experiment(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (sets, lines): (Vec<&str>, Vec<&str>) = text.split('\n').partition(|line| line.starts_with("--set "));
    let sets = sets.iter().map(|line| line["--set ".len()..].to_owned()).collect();
    let overrides = Overrides { sets, ..Overrides::default() };
    match Config::parse(&lines.join("\n"), "x.toml", Path::new(""), &overrides) {
        Ok(config) => _ = config.hash(),
        Err(error) => _ = error.to_string(),
    }
}

/// A safetensors file: its header, and every tensor that it names.
pub fn safetensors(bytes: &[u8]) {
    file(bytes, ".safetensors", |path| {
        let Ok(tensors) = TensorFile::open(path) else { return };
        for name in tensors.names() {
            let _ = tensors.tensor(&name);
        }
    });
}

fn rows(bytes: &[u8], ending: &str) {
    let data = Data {
        source: Source::Sample,
        format: Format::Auto,
        text: "text".into(),
        text_pair: None,
        label: "label".into(),
        id: None,
        split: Split { validation: 0.1, test: 0.2, seed: 42 },
    };
    file(bytes, ending, |path| {
        for labelled in [true, false] {
            if let Ok(table) = source::read(path, &data, labelled) {
                table.rows.iter().enumerate().for_each(|(i, _)| _ = table.place(i));
            }
        }
    });
}

/// Rows of CSV, and of TSV.
pub fn delimited(bytes: &[u8]) {
    rows(bytes, ".csv");
    rows(bytes, ".tsv");
}

/// Rows of JSON.
pub fn jsonl(bytes: &[u8]) {
    rows(bytes, ".jsonl");
}

/// Rows of Arrow, in both formats.
pub fn arrow(bytes: &[u8]) {
    rows(bytes, ".arrow");
}

/// A launcher's variables, as lines of NAME=VALUE.
pub fn launcher(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let variables: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let _ = World::from_launcher(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()));
}

/// An ONNX file.
pub fn onnx(bytes: &[u8]) {
    file(bytes, ".onnx", |path| _ = onnx::read(path));
}

/// A metrics.jsonl; cutting it back reads it the same way.
pub fn events(bytes: &[u8]) {
    file(bytes, ".jsonl", |path| _ = track::read(path));
}

/// The JSON files of a run and of a checkpoint: each is read as every one of them.
pub fn records(bytes: &[u8]) {
    file(bytes, ".json", |path| {
        let _ = Index::read(path).map(|index| index.files().count());
        let _ = store::read_json::<Statistics>(path);
        let _ = store::read_json::<store::RunRecord>(path);
        let _ = store::read_json::<store::Pins>(path);
    });
}
