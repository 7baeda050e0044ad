//! Rows of data.

use std::fs::{self, File};
use std::path::Path;
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

use super::{Table, WORDS, fifo, prepare, words};
use crate::support::skipped;

pub(super) fn delimited(table: &mut Table) {
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

pub(super) fn jsonl(table: &mut Table) {
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

pub(super) fn batch(columns: &[(&str, &str)]) -> RecordBatch {
    let fields: Vec<Field> =
        columns.iter().map(|(name, what)| Field::new(*name, column(what).data_type().clone(), true)).collect();
    let arrays = columns.iter().map(|(_, what)| column(what)).collect();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).unwrap()
}

/// A table in one of the formats.
pub(super) fn written(format: &str, batch: &RecordBatch) -> Vec<u8> {
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

pub(super) fn columnar(table: &mut Table) {
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

pub(super) fn folders(table: &mut Table) {
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
