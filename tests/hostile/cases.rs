//! The table.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use arrow_array::builder::{Int32Builder, ListBuilder, StringBuilder};
use arrow_array::types::Int8Type;
use arrow_array::{
    ArrayRef, BooleanArray, Date32Array, Decimal128Array, DictionaryArray, Float64Array, RecordBatch, StringArray,
    StructArray,
};
use arrow_ipc::writer::{FileWriter, StreamWriter};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;

use super::{Case, WORDS};
use crate::support::skipped;

/// A table that grows.
#[derive(Default)]
struct Table(Vec<Case>);

const RUN: &str = "kiln-runs/hostile/runs/1";

pub fn all() -> Vec<Case> {
    let mut table = Table::default();
    experiment(&mut table);
    delimited(&mut table);
    jsonl(&mut table);
    columnar(&mut table);
    folders(&mut table);
    models(&mut table);
    runs(&mut table);
    onnx(&mut table);
    checkpoints(&mut table);
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

fn delimited(table: &mut Table) {
    let header = "id,text,label\n";
    let good: String = (0..60).map(|i| format!("{i},text {i} {},l{}\n", WORDS[i % 7], i % 2)).collect();
    let with = |rows: &str| format!("{header}{good}{rows}").into_bytes();
    table.add("csv: not there", &[2], &["none.csv"], |_| prepare("none.csv"));
    table.add("csv: a folder", &[2], &["x.csv"], |folder| {
        fs::create_dir(folder.join("x.csv")).unwrap();
        prepare("x.csv")
    });
    table.add("csv: a FIFO", &[2], &["x.csv", "no regular file"], |folder| {
        fifo(&folder.join("x.csv"));
        prepare("x.csv")
    });
    table.add("csv: a device", &[2], &["/dev/zero", "no regular file"], |_| {
        [prepare("/dev/zero"), words("--set data.format=csv")].concat()
    });
    if unreadable_is_readable() {
        skipped("what may not be read: this user reads everything");
    } else {
        table.add("csv: unreadable", &[2], &["rows.csv", "Permission denied"], |folder| {
            use std::os::unix::fs::PermissionsExt as _;
            fs::set_permissions(folder.join("rows.csv"), fs::Permissions::from_mode(0o000)).unwrap();
            prepare("rows.csv")
        });
    }
    table.source("x.csv", "empty", 2, &["x.csv"], "");
    table.source("x.csv", "a header alone", 2, &["x.csv holds no rows"], header);
    table.source("x.csv", "a ragged row", 2, &["x.csv: line 62: 2 fields where the header has 3"], with("7,text\n"));
    table.source(
        "x.csv",
        "Latin-1",
        2,
        &["x.csv: line 62: invalid UTF-8 at byte 1 of \"text\""],
        [with("7,"), b"t\xe9xt,l0\n".to_vec()].concat(),
    );
    table.source(
        "x.csv",
        "UTF-16",
        2,
        &["x.csv"],
        "\u{feff}id,text,label\n1,a,b\n".encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>(),
    );
    table.source(
        "x.csv",
        "an open quote in the last column",
        2,
        &["x.csv: line 62: ", "quote"],
        with("7,some text,\"l0\n8,more text,l1\n9,yet more,l0\n"),
    );
    table.source(
        "x.csv",
        "an open quote before it",
        2,
        &["x.csv: line 62: "],
        with("7,\"some text,l0\n8,more text,l1\n"),
    );
    table.source("x.csv", "no text", 2, &["x.csv: line 62: empty text in \"text\""], with("7, ,l0\n"));
    table.source("x.csv", "no label", 2, &["x.csv: line 62: no label in \"label\""], with("7,text,\n"));
    table.source(
        "x.csv",
        "no label column",
        2,
        &["x.csv: no column \"label\" (data.label); there are \"text\", \"lable\""],
        "text,lable\na,b\n",
    );
    table.source("x.csv", "a column twice", 2, &["x.csv", "\"text\"", "2 columns"], "text,text,label\na,b,c\n");
    table.source(
        "x.csv",
        "as many labels as rows",
        2,
        &["needs 2; drop the label"],
        (0..20_000).fold(header.to_owned(), |all, i| all + &format!("{i},text {i},label {i}\n")),
    );
    // What is odd, and right.
    table.source(
        "x.csv",
        "a BOM, CRLF, NUL bytes",
        0,
        &[],
        format!("\u{feff}{}", String::from_utf8(with("7,nul \0 byte,l0\n")).unwrap()).replace('\n', "\r\n"),
    );
    table.source("x.csv", "a line of 10 MB", 0, &[], with(&format!("7,{},l0\n", "long ".repeat(2_000_000))));
    let odd: String = (0..20).map(|i| format!("{i},again {i},\"../a\nb\"\n")).collect();
    table.source("x.csv", "labels with slashes and line breaks", 0, &[], with(&odd));
    table.source("x.tsv", "commas", 2, &["x.tsv: no column \"text\""], with(""));
    table.source("x.xyz", "an unknown ending", 2, &["x.xyz", "set data.format"], with(""));
    table.add("csv: to predict on, no column", &[2], &["new.csv: no column \"text\""], |folder| {
        fs::write(folder.join("new.csv"), "id,txt\n1,a\n").unwrap();
        words("infer hostile/1 --model a --input new.csv --output out.parquet")
    });
    table.add("csv: to predict on, not there", &[2], &["new.csv"], |_| {
        words("infer hostile/1 --model a --input new.csv --output out.parquet")
    });
    table.add("csv: predictions go where a folder is", &[1, 2], &["base"], |folder| {
        fs::write(folder.join("new.csv"), "id,text\n1,a\n").unwrap();
        words("infer hostile/1 --model a --input new.csv --output base")
    });
}

fn unreadable_is_readable() -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o000)).unwrap();
    File::open(file.path()).is_ok()
}

fn jsonl(table: &mut Table) {
    let good: String = (0..60).map(|i| format!("{{\"text\": \"row {i}\", \"label\": \"l{}\"}}\n", i % 2)).collect();
    for (name, line, says) in [
        ("cut", "{\"text\": \"a", "x.jsonl: line 61: needs one JSON object a line"),
        ("a list", "[1]", "x.jsonl: line 61: needs one JSON object a line"),
        (
            "a number for a text",
            "{\"text\": 7, \"label\": \"l0\"}",
            "x.jsonl: line 61: \"text\" (data.text) is 7: needs a string",
        ),
        (
            "a list of labels",
            "{\"text\": \"a\", \"label\": [\"l0\"]}",
            "x.jsonl: line 61: \"label\" (data.label) is a list",
        ),
        ("a float for a label", "{\"text\": \"a\", \"label\": 1e400}", "x.jsonl: line 61"),
        ("an object for a label", "{\"text\": \"a\", \"label\": {}}", "x.jsonl: line 61: \"label\" (data.label) is {}"),
        ("a missing key", "{\"label\": \"l0\"}", "x.jsonl: line 61: no column \"text\""),
        ("a NUL byte", "{\"text\": \"a\0\", \"label\": \"l0\"}", "x.jsonl: line 61"),
        ("half a surrogate", "{\"text\": \"\\ud800\", \"label\": \"l0\"}", "x.jsonl: line 61"),
    ] {
        table.source("x.jsonl", name, 2, &[says], format!("{good}{line}\n"));
    }
    table.source(
        "x.jsonl",
        "deep lists",
        2,
        &["x.jsonl: line 61: ", "recursion"],
        format!("{good}{{\"text\": {}", "[".repeat(1_000_000)),
    );
    table.source(
        "x.jsonl",
        "not UTF-8",
        2,
        &["x.jsonl: line 61: invalid UTF-8"],
        [good.as_bytes(), b"{\"text\": \"\xff\"}"].concat(),
    );
    table.source("x.jsonl", "10 MB without a line break", 2, &["x.jsonl: line 1: "], "x".repeat(10_000_000));
    table.source("x.jsonl", "empty", 2, &["x.jsonl holds no rows"], "\n\n\n");
}

/// Columns of a table of 60 rows.
fn column(what: &str) -> ArrayRef {
    let rows = 0..60;
    match what {
        "strings" => Arc::new(StringArray::from_iter_values(rows.map(|i| format!("row {i}")))),
        "labels" => Arc::new(StringArray::from_iter_values(rows.map(|i| format!("l{}", i % 2)))),
        "nulls" => Arc::new(StringArray::from_iter(rows.map(|i| (i != 7).then(|| format!("l{}", i % 2))))),
        "floats" => Arc::new(Float64Array::from_iter_values(rows.map(f64::from))),
        "booleans" => Arc::new(BooleanArray::from_iter(rows.map(|i| Some(i % 2 == 0)))),
        "dates" => Arc::new(Date32Array::from_iter_values(rows.map(|i| i % 2))),
        "decimals" => Arc::new(Decimal128Array::from_iter_values(rows.map(|i| i128::from(i % 2)))),
        "dictionary" => {
            let labels: Vec<String> = rows.map(|i| format!("l{}", i % 2)).collect();
            Arc::new(labels.iter().map(String::as_str).collect::<DictionaryArray<Int8Type>>())
        }
        "lists" => {
            let mut lists = ListBuilder::new(StringBuilder::new());
            rows.for_each(|i| lists.append_value([Some(format!("l{}", i % 2))]));
            Arc::new(lists.finish())
        }
        "structs" => {
            Arc::new(StructArray::from(vec![(Arc::new(Field::new("x", DataType::Utf8, false)), column("labels"))]))
        }
        "nested" => {
            let mut lists = ListBuilder::new(ListBuilder::new(Int32Builder::new()));
            rows.for_each(|_| lists.append(true));
            Arc::new(lists.finish())
        }
        other => unreachable!("{other}"),
    }
}

fn batch(columns: &[(&str, &str)]) -> RecordBatch {
    let fields: Vec<Field> =
        columns.iter().map(|(name, what)| Field::new(*name, column(what).data_type().clone(), true)).collect();
    let arrays = columns.iter().map(|(_, what)| column(what)).collect();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).unwrap()
}

/// A table in one of the formats.
fn written(format: &str, batch: &RecordBatch) -> Vec<u8> {
    let mut bytes = Vec::new();
    match format {
        "parquet" => {
            let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
            writer.write(batch).unwrap();
            writer.close().unwrap();
        }
        "stream" => {
            let mut writer = StreamWriter::try_new(&mut bytes, &batch.schema()).unwrap();
            writer.write(batch).unwrap();
            writer.finish().unwrap();
        }
        "file" => {
            let mut writer = FileWriter::try_new(&mut bytes, &batch.schema()).unwrap();
            writer.write(batch).unwrap();
            writer.finish().unwrap();
        }
        other => unreachable!("{other}"),
    }
    bytes
}

/// A good Arrow stream.
pub fn stream() -> Vec<u8> {
    written("stream", &batch(&[("text", "strings"), ("label", "labels")]))
}

fn columnar(table: &mut Table) {
    let good = batch(&[("text", "strings"), ("label", "labels")]);
    for (file, format) in [("x.parquet", "parquet"), ("x.arrow", "stream"), ("x.arrow", "file")] {
        let bytes = written(format, &good);
        let name = |what: &str| format!("{what} ({format})");
        table.source(file, &name("empty"), 2, &[file], "");
        table.source(file, &name("cut"), 2, &[file], &bytes[..bytes.len() * 2 / 3]);
        table.source(file, &name("no such thing"), 2, &[file], "text,label\na,b\n".repeat(50));
        table.source(file, &name("no rows"), 2, &[file, "no rows"], written(format, &good.slice(0, 0)));
        for (text, label, says) in [
            ("lists", "labels", "row 0: \"text\" (data.text) is a list: needs a string"),
            ("structs", "labels", "row 0: \"text\" (data.text) is of type Struct"),
            ("nested", "labels", "row 0: \"text\" (data.text) is a list"),
            ("strings", "lists", "row 0: \"label\" (data.label) is a list"),
            ("strings", "decimals", "row 0: \"label\" (data.label) is of type Decimal128"),
            ("strings", "dates", "row 0: \"label\" (data.label) is of type Date32"),
            ("strings", "floats", "row 0: \"label\" (data.label) is of type Float64"),
            ("strings", "booleans", "row 0: \"label\" (data.label) is of type Boolean"),
            ("strings", "nulls", "row 7: no label in \"label\""),
        ] {
            let bytes = written(format, &batch(&[("text", text), ("label", label)]));
            table.source(file, &name(&format!("{text}, {label}")), 2, &[file, says], bytes);
        }
        let twice = batch(&[("text", "strings"), ("label", "labels"), ("label", "labels")]);
        table.source(file, &name("a column twice"), 2, &[file, "\"label\"", "2 columns"], written(format, &twice));
        let dictionary = batch(&[("text", "strings"), ("label", "dictionary")]);
        table.source(file, &name("a dictionary"), 0, &[], written(format, &dictionary));
    }
    let mut parquet = written("parquet", &good);
    let end = parquet.len() - 8;
    parquet[end..end + 4].copy_from_slice(&i32::MAX.to_le_bytes());
    table.source("x.parquet", "a footer of 2 GB", 2, &["x.parquet"], parquet);
    // A continuation, then the length of what is to follow.
    table.source("x.arrow", "a message of 2 GB", 2, &["x.arrow"], [[0xff; 4], i32::MAX.to_le_bytes(), [0; 4]].concat());
    table.source("x.arrow", "a message of less than nothing", 2, &["x.arrow"], [[0xff; 4], [0xff; 4], [0; 4]].concat());
}

fn folders(table: &mut Table) {
    let of = |name: &str, code: i32, says: &[&'static str], spoil: fn(&Path)| {
        (format!("folders: {name}"), code, says.to_vec(), spoil)
    };
    for (name, code, says, spoil) in [
        of("empty", 2, &["texts holds no folders"], |_| ()),
        of("a label without a text", 2, &["texts/b holds no .txt files"], |texts| {
            fs::create_dir(texts.join("b")).unwrap()
        }),
        of("Latin-1", 2, &["texts/a/0.txt: invalid UTF-8 at byte 1"], |texts| {
            fs::create_dir(texts.join("a")).unwrap();
            fs::write(texts.join("a/0.txt"), b"t\xe9xt").unwrap();
        }),
        of("an empty text", 2, &["texts/a/0.txt: empty text"], |texts| {
            fs::create_dir(texts.join("a")).unwrap();
            fs::write(texts.join("a/0.txt"), b"\n").unwrap();
        }),
        of("a FIFO", 2, &["texts/a/0.txt", "no regular file"], |texts| {
            fs::create_dir(texts.join("a")).unwrap();
            fifo(&texts.join("a/0.txt"));
        }),
        of("a link to nowhere", 2, &["texts/a/0.txt"], |texts| {
            fs::create_dir(texts.join("a")).unwrap();
            std::os::unix::fs::symlink("nowhere", texts.join("a/0.txt")).unwrap();
        }),
        of("a link to itself", 2, &["texts/a holds no .txt files"], |texts| {
            fs::create_dir(texts.join("a")).unwrap();
            std::os::unix::fs::symlink("..", texts.join("a/up")).unwrap();
            std::os::unix::fs::symlink(".", texts.join("loop")).unwrap();
        }),
        of("a name that is not UTF-8", 2, &["texts: the name", "rename it"], |texts| {
            use std::os::unix::ffi::OsStrExt as _;
            fs::create_dir(texts.join(std::ffi::OsStr::from_bytes(b"\xff"))).unwrap();
        }),
    ] {
        table.add(name, &[code], &says, move |folder| {
            fs::create_dir(folder.join("texts")).unwrap();
            spoil(&folder.join("texts"));
            prepare("texts")
        });
    }
}

const TRAIN: &str = "train experiment.toml --stop-after train";

/// A safetensors file of this header and so many bytes.
fn safetensors(header: &str, bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; bytes]].concat()
}

fn models(table: &mut Table) {
    let tokenizer = "base/tokenizer.json";
    let says: (i32, &[&'static str]) = (2, &["base/tokenizer.json: no tokenizer"]);
    table.file(tokenizer, "empty", TRAIN, says, |_| Vec::new());
    table.file(tokenizer, "cut", TRAIN, says, |whole| whole[..whole.len() / 2].to_vec());
    table.file(tokenizer, "deep lists", TRAIN, says, |_| vec![b'['; 1_000_000]);
    table.file(tokenizer, "another thing", TRAIN, says, |_| b"{\"version\": 7}".to_vec());
    table.file(tokenizer, "bytes", TRAIN, says, |_| vec![0xff; 100]);
    table.file(
        tokenizer,
        "ids that the model does not have",
        TRAIN,
        (2, &["model \"a\"", "the id 900000", "vocab_size = 102"]),
        |whole| {
            let mut tokenizer: serde_json::Value = serde_json::from_slice(whole).unwrap();
            tokenizer["model"]["vocab"]["row"] = 900_000.into();
            serde_json::to_vec(&tokenizer).unwrap()
        },
    );
    table.add("tokenizer.json: a folder", &[2], &["base/tokenizer.json"], |folder| {
        fs::remove_file(folder.join("base/tokenizer.json")).unwrap();
        fs::create_dir(folder.join("base/tokenizer.json")).unwrap();
        words(TRAIN)
    });

    let config = "base/config.json";
    table.file(config, "cut", TRAIN, (2, &["base/config.json"]), |whole| whole[..40].to_vec());
    table.file(config, "a list", TRAIN, (2, &["base/config.json"]), |_| b"[]".to_vec());
    table.file(config, "deep lists", TRAIN, (2, &["base/config.json"]), |_| vec![b'['; 1_000_000]);
    for (key, value, says) in [
        ("hidden_size", "0", "hidden_size = 0"),
        ("hidden_size", "-16", "hidden_size = -16"),
        ("hidden_size", "1e30", "hidden_size = 1e"),
        ("hidden_size", "\"16\"", "hidden_size = \"16\""),
        ("hidden_size", "null", "hidden_size = null"),
        ("hidden_size", "32", "is [102, 16] in the checkpoint"),
        ("num_attention_heads", "7", "num_attention_heads = 7"),
        ("num_attention_heads", "0", "num_attention_heads = 0"),
        ("num_hidden_layers", "1099511627776", "num_hidden_layers = 1099511627776"),
        ("num_hidden_layers", "0", "num_hidden_layers = 0"),
        ("vocab_size", "1099511627776", "vocab_size = 1099511627776"),
        ("vocab_size", "1000000", "config.json makes it [1000000, 16]"),
        ("intermediate_size", "4611686018427387904", "intermediate_size = 4611686018427387904"),
        ("max_position_embeddings", "0", "max_position_embeddings = 0"),
        ("max_position_embeddings", "18446744073709551615", "max_position_embeddings = 18446744073709551615"),
        ("type_vocab_size", "0", "type_vocab_size = 0"),
        ("layer_norm_eps", "-1.0", "layer_norm_eps = -1"),
        ("layer_norm_eps", "\"x\"", "layer_norm_eps = \"x\""),
        ("initializer_range", "-1.0", "initializer_range = -1"),
        ("hidden_dropout_prob", "1.5", "hidden_dropout_prob = 1.5"),
        ("hidden_act", "\"swish\"", "hidden_act = \"swish\""),
        ("model_type", "\"gpt2\"", "model_type \"gpt2\" is not known"),
        ("model_type", "7", "model_type"),
    ] {
        table.add(format!("config.json: {key} = {value}"), &[2], &["base", says], move |folder| {
            let path = folder.join("base/config.json");
            let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            config[key] = serde_json::from_str(value).unwrap();
            fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
            words(TRAIN)
        });
    }
    table.add("config: of a new model", &[2], &["num_hidden_layers = 1099511627776"], |_| {
        words("check --set model.0.config.num_hidden_layers=1099511627776")
    });

    let weights = "base/model.safetensors";
    let says: (i32, &[&'static str]) = (2, &["base/model.safetensors"]);
    table.file(weights, "empty", TRAIN, says, |_| Vec::new());
    table.file(weights, "cut", TRAIN, says, |whole| whole[..whole.len() - 1].to_vec());
    table.file(weights, "a header of 2^60 bytes", TRAIN, says, |_| {
        [&(1u64 << 60).to_le_bytes()[..], &[b' '; 100]].concat()
    });
    table.file(weights, "a header of 2^64 bytes", TRAIN, says, |_| vec![0xff; 100]);
    table.file(weights, "deep lists", TRAIN, says, |_| safetensors(&"[".repeat(1_000_000), 0));
    for (name, header, bytes) in [
        (
            "overlapping",
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
        ),
        ("backwards", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4),
        ("an overflowing shape", r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#, 0),
        (
            "offsets of 2^60",
            r#"{"a":{"dtype":"F32","shape":[288230376151711744],"data_offsets":[0,1152921504606846976]}}"#,
            4,
        ),
        (
            "one name twice",
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            8,
        ),
        ("no dtype", r#"{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#, 4),
        ("bytes of nothing", r#"{"__metadata__":{"format":"pt"}}"#, 10),
        ("integers", r#"{"classifier.bias":{"dtype":"I32","shape":[3],"data_offsets":[0,12]}}"#, 12),
        (
            "another shape",
            r#"{"bert.embeddings.LayerNorm.bias":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}"#,
            12,
        ),
    ] {
        let file = safetensors(header, bytes);
        table.file(weights, name, TRAIN, (2, &["base"]), move |_| file.clone());
    }
    table.add("weights: none", &[2], &["base has none of model.safetensors"], |folder| {
        fs::remove_file(folder.join("base/model.safetensors")).unwrap();
        words(TRAIN)
    });
    for (name, file, bytes, says) in [
        (
            "an index that leads elsewhere",
            "model.safetensors.index.json",
            r#"{"weight_map":{"a":"../../x"}}"#.as_bytes(),
            "names \"../../x\"",
        ),
        (
            "an index of what is not there",
            "model.safetensors.index.json",
            br#"{"weight_map":{"a":"a.safetensors"}}"#,
            "base/a.safetensors is not there",
        ),
        ("an index that is none", "model.safetensors.index.json", b"[", "model.safetensors.index.json"),
        (
            "an index of numbers",
            "model.safetensors.index.json",
            br#"{"weight_map":{"a":7}}"#,
            "model.safetensors.index.json",
        ),
        ("a pickle that is none", "pytorch_model.bin", b"\x80\x02not a pickle.", "base/pytorch_model.bin"),
        (
            "an archive without one",
            "pytorch_model.bin",
            b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            "base/pytorch_model.bin",
        ),
        ("an empty pickle", "pytorch_model.bin", b"", "base/pytorch_model.bin"),
    ] {
        table.add(format!("weights: {name}"), &[2], &[says], move |folder| {
            fs::remove_file(folder.join("base/model.safetensors")).unwrap();
            fs::write(folder.join("base").join(file), bytes).unwrap();
            words(TRAIN)
        });
    }
    table.add("model: no folder", &[2], &["nowhere"], |_| {
        words("train experiment.toml --stop-after train --set model.0.path=nowhere")
    });
    table.add("model: a FIFO for its config", &[2], &["base/config.json is not there"], |folder| {
        fs::remove_file(folder.join("base/config.json")).unwrap();
        fifo(&folder.join("base/config.json"));
        words(TRAIN)
    });
    table.add("init_from: nowhere", &[2], &["hostile/9"], |_| {
        words("train experiment.toml --stop-after train --set train.init_from=hostile/9/a")
    });
}

fn path(file: &str) -> String {
    format!("{RUN}/{file}")
}

fn runs(table: &mut Table) {
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
        assert!(super::command(folder, &infer).output().unwrap().status.success());
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

fn snapshot(folder: &Path) -> std::path::PathBuf {
    let mut entries = fs::read_dir(folder.join("kiln-runs/hostile/data")).unwrap();
    entries.next().unwrap().unwrap().path()
}

/// The test part's encoding.
fn encoding(folder: &Path) -> std::path::PathBuf {
    let entries = fs::read_dir(snapshot(folder).join("test")).unwrap();
    entries.map(|entry| entry.unwrap().path()).find(|path| path.join("card.json").exists()).unwrap()
}

fn onnx(table: &mut Table) {
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
const FIRST: &str = "first/hostile/runs/1";
const RESUME: &str = "train first.toml --stop-after train --root first";

fn unfinished(folder: &Path) {
    let record = folder.join(FIRST).join("run.json");
    let text = fs::read_to_string(&record).unwrap().replace("\"stopped\"", "\"interrupted\"");
    fs::write(&record, text).unwrap();
    fs::remove_file(folder.join(FIRST).join("base/statistics.json")).unwrap();
}

fn checkpoints(table: &mut Table) {
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

/// One byte of a file is another, at places drawn from a seed: some do no harm, and where one does it is an
/// error as any other.
fn flipped(table: &mut Table) {
    let good = batch(&[("text", "strings"), ("label", "labels")]);
    for (file, format) in [("x.parquet", "parquet"), ("x.arrow", "stream"), ("x.arrow", "file")] {
        let bytes = written(format, &good);
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
                unfinished(folder);
                let path = folder.join(FIRST).join("base/checkpoints/2").join(file);
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, flip(&bytes, seed)).unwrap();
                words(RESUME)
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
