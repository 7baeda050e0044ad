//! The table.

mod models;
mod rows;
mod runs;

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Case, WORDS};
pub use rows::stream;

/// A table that grows.
#[derive(Default)]
struct Table(Vec<Case>);

const TRAIN: &str = "train experiment.toml --stop-after train";
const RUN: &str = "kiln-runs/hostile/runs/1";

pub fn all() -> Vec<Case> {
    let mut table = Table::default();
    experiment(&mut table);
    rows::delimited(&mut table);
    rows::jsonl(&mut table);
    rows::columnar(&mut table);
    rows::folders(&mut table);
    models::models(&mut table);
    runs::runs(&mut table);
    runs::onnx(&mut table);
    runs::checkpoints(&mut table);
    flipped(&mut table);
    table.0
}

impl Table {
    fn add(
        &mut self,
        name: impl Into<String>,
        codes: &[i32],
        says: &[&'static str],
        spoil: impl Fn(&Path) -> Vec<String> + Send + Sync + 'static,
    ) {
        self.0.push(Case { name: name.into(), spoil: Box::new(spoil), codes: codes.to_vec(), says: says.to_vec() });
    }

    /// An experiment file of these bytes.
    fn toml(&mut self, name: &str, says: &[&'static str], bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        self.add(format!("toml: {name}"), &[2], says, move |folder| {
            fs::write(folder.join("experiment.toml"), &bytes).unwrap();
            words("check experiment.toml")
        });
    }

    /// Something laid over the experiment file.
    fn set(&mut self, set: &'static str, says: &[&'static str]) {
        self.add(format!("--set {set}"), &[2], says, move |_| {
            [words("check experiment.toml --set"), vec![set.to_owned()]].concat()
        });
    }

    /// A source of these bytes.
    fn source(&mut self, file: &'static str, name: &str, code: i32, says: &[&'static str], bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        self.add(format!("{file}: {name}"), &[code], says, move |folder| {
            fs::write(folder.join(file), &bytes).unwrap();
            prepare(file)
        });
    }

    /// A file of what is there, put in place of the one that is there, and a command.
    fn file(
        &mut self,
        file: &'static str,
        name: &str,
        run: &'static str,
        (code, says): (i32, &[&'static str]),
        change: impl Fn(&[u8]) -> Vec<u8> + Send + Sync + 'static,
    ) {
        self.add(format!("{file}: {name}"), &[code], says, move |folder| {
            let path = folder.join(file);
            let bytes = fs::read(&path).unwrap_or_default();
            fs::write(&path, change(&bytes)).unwrap();
            words(run)
        });
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn prepare(source: &str) -> Vec<String> {
    words(&format!("prepare experiment.toml --set data.source={source}"))
}

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// The experiment file with `from` in it become `to`.
fn edited(from: &str, to: &str) -> String {
    let toml = "name = \"hostile\"\nroot = \"kiln-runs\"\n[data]\nsource = \"rows.csv\"\n[[model]]\nname = \"a\"\npath = \
                \"base\"\n[train]\nepochs = 1\n";
    assert!(toml.contains(from), "{from}");
    toml.replace(from, to)
}

fn experiment(table: &mut Table) {
    table.add("toml: not there", &[2], &["none.toml", "No such file"], |_| words("check none.toml"));
    table.add("toml: a folder", &[2], &["cannot read the experiment file kiln-runs"], |_| words("check kiln-runs"));
    table.toml("not UTF-8", &["experiment.toml", "UTF-8"], b"name = \"\xff\xfe\"".to_vec());
    table.toml("a NUL byte", &["experiment.toml:1:"], b"na\0me = 1".to_vec());
    table.toml("deep lists", &["experiment.toml:1:"], format!("a = {}", "[".repeat(100_000)));
    table.toml("deep tables", &["experiment.toml:1:"], format!("a = {}", "{a=".repeat(100_000)));
    table.toml("a deep key", &["experiment.toml:"], format!("{}a = 1", "a.".repeat(100_000)));
    table.toml("a deep header", &["experiment.toml:"], format!("[{}a]\nb = 1", "a.".repeat(100_000)));
    let keys: String = (0..400_000).map(|i| format!("unknown_key_{i} = 1\n")).collect();
    table.toml("10 MB of unknown keys", &["experiment.toml:1:1", "unknown key `unknown_key_0`", "more"], keys);
    table.toml("10 MB in one line", &["experiment.toml:1:8"], format!("name = \"{}\"", "a".repeat(10_000_000)));
    table.toml("cut", &["experiment.toml:8:"], edited("[train]\nepochs = 1\n", "[train"));
    table.toml(
        "a key twice",
        &["experiment.toml:2:1", "duplicate key"],
        edited("root = \"kiln-runs\"", "name = \"x\""),
    );
    table.toml("a path for a name", &["experiment.toml:1:8", "../../x"], edited("\"hostile\"", "\"../../x\""));
    table.toml("no model", &["model"], edited("[[model]]\nname = \"a\"\npath = \"base\"\n", ""));
    table.toml(
        "a model's name twice",
        &["experiment.toml:", "a name that no other model has"],
        edited("[train]", "[[model]]\nname = \"a\"\npath = \"base\"\n[train]"),
    );
    table.toml(
        "a BOM and a mistake",
        &["experiment.toml:", "`train.epochs` is 0"],
        "\u{feff}".to_owned() + &edited("epochs = 1", "epochs = 0").replace('\n', "\r\n"),
    );
    for (set, says) in [
        ("train.epochs=99999999999999999999", "does not fit 64 bits"),
        ("train.epochs=-1", "`train.epochs` is -1"),
        ("train.learning_rate=nan", "`train.learning_rate` is NaN"),
        ("train.learning_rate=inf", "`train.learning_rate` is inf"),
        ("train.learning_rate=-1", "`train.learning_rate` is -1"),
        ("train.batch_size=0", "`train.batch_size` is 0"),
        ("train.threads=1000000000", "`train.threads` is 1000000000"),
        ("data.max_length=4611686018427387904", "`data.max_length`"),
        ("data.split.validation=nan", "`data.split.validation` is NaN"),
        ("data.text=[1,2]", "`data.text` is a list"),
        ("data.label=1979-05-27", "`data.label` is the date 1979-05-27"),
        ("model.7.name=x", "needs an index from 0 to 1"),
        ("model.0.path={}", "`model.0.path` is a table"),
        ("train", "needs KEY=VALUE"),
        ("a[=1", "is no key"),
        ("=", "is no key"),
        ("root=s3://bucket/x", "s3://bucket/x"),
    ] {
        table.set(set, &[says]);
    }
    table.add("--set: deep lists", &[2], &["`name` is"], |_| {
        [words("check experiment.toml --set"), vec![format!("name={}", "[".repeat(100_000))]].concat()
    });
    table.add("--set: a deep key", &[2], &["--set"], |_| {
        [words("check experiment.toml --set"), vec![format!("{}a=1", "a.".repeat(50_000))]].concat()
    });
    table.add("--root is a file", &[1, 2], &["rows.csv"], |_| words("prepare experiment.toml --root rows.csv"));
}

/// One byte of a file is another, at places drawn from a seed: some do no harm, and where one does it is an
/// error as any other.
fn flipped(table: &mut Table) {
    let good = rows::batch(&[("text", "strings"), ("label", "labels")]);
    for (file, format) in [("x.parquet", "parquet"), ("x.arrow", "stream"), ("x.arrow", "file")] {
        let bytes = rows::written(format, &good);
        for seed in 0..15 {
            let flipped = flip(&bytes, seed);
            table.add(format!("{file} ({format}): flip {seed}"), &[0, 2], &[], move |folder| {
                fs::write(folder.join(file), &flipped).unwrap();
                prepare(file)
            });
        }
    }
    for (file, run, count) in [
        ("base/tokenizer.json", TRAIN, 12),
        ("base/config.json", TRAIN, 8),
        ("base/model.safetensors", TRAIN, 6),
        ("kiln-runs/hostile/runs/1/a/model.onnx", "infer hostile/1 --model a", 24),
        ("kiln-runs/hostile/runs/1/a/test/predictions.parquet", "compare hostile/1", 10),
        ("kiln-runs/hostile/runs/1/lock.json", "infer hostile/1", 6),
    ] {
        for seed in 0..count {
            table.add(format!("{file}: flip {seed}"), &[0, 1, 2], &[], move |folder| {
                let bytes = fs::read(folder.join(file)).unwrap();
                fs::write(folder.join(file), flip(&bytes, seed)).unwrap();
                words(run)
            });
        }
    }
    for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        for seed in 0..6 {
            table.add(format!("checkpoint: {file}: flip {seed}"), &[0, 1, 2], &[], move |folder| {
                runs::unfinished(folder);
                let path = folder.join(runs::FIRST).join("base/checkpoints/2").join(file);
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, flip(&bytes, seed)).unwrap();
                words(runs::RESUME)
            });
        }
    }
}

/// Another byte somewhere: every other time in the first 1 % or the last, where what the rest means stands.
fn flip(bytes: &[u8], seed: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let draw = |n: u64| {
        (seed * 4 + n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33
    };
    let (length, edge) = (bytes.len(), (bytes.len() / 100).max(64).min(bytes.len()));
    let at = match seed % 4 {
        0 => draw(0) as usize % edge,
        1 => length - 1 - draw(0) as usize % edge,
        _ => draw(0) as usize % length,
    };
    bytes[at] ^= 1 << (draw(1) % 8);
    bytes[at] ^= if draw(2) % 2 == 0 { 0xf0 } else { 0 };
    bytes
}
