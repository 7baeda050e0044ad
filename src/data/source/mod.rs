//! Reads what the user has (CSV, TSV, JSONL, Parquet, Arrow, folders of text files) into [`Row`]s.
//!
//! Nothing is repaired in silence: a row that is broken, empty or without a label is an error that
//! names the file and the line, so that a number of rows here is the number of rows there.

mod columnar;
mod delimited;
mod folders;
mod jsonl;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Result;
use sha2::{Digest, Sha256};

use super::rows::Row;
use crate::config::{Data, Format};
use crate::store::sha256_file;
use crate::user_error;

/// The rows of one file or folder, and where each stood.
pub struct Table {
    /// The file or folder.
    pub path: PathBuf,
    /// Its rows, in their order there.
    pub rows: Vec<Row>,
    places: Places,
}

/// How a row's place is told.
enum Places {
    /// Line numbers, from 1: a quoted field may hold several lines.
    Lines(Vec<u64>),
    /// The row's own number, from 0.
    Rows,
    /// The row's id is a file's path in the folder.
    Files,
}

impl Table {
    /// Rows whose place is their number.
    pub fn numbered(path: PathBuf, rows: Vec<Row>) -> Self {
        Self { path, rows, places: Places::Rows }
    }

    /// Where row `i` stands, for messages: `bbc.csv: line 12`.
    pub fn place(&self, i: usize) -> String {
        match &self.places {
            Places::Lines(lines) => format!("{}: line {}", self.path.display(), lines[i]),
            Places::Rows => format!("{}: row {i}", self.path.display()),
            Places::Files => self.path.join(&self.rows[i].id).display().to_string(),
        }
    }
}

/// Rows for inference: a label is kept where there is one.
///
/// # Errors
/// As [`read`]'s, but for missing labels.
pub fn read_rows(path: &Path, data: &Data) -> Result<Vec<Row>> {
    Ok(read(path, data, false)?.rows)
}

/// Reads `path` by the format and columns of `data`.
///
/// # Errors
/// The user's, naming file and row: a format that cannot be told, a column that is not there, a
/// ragged row, invalid UTF-8, an empty text, a list for a label, and, with `labelled`, no label.
pub fn read(path: &Path, data: &Data, labelled: bool) -> Result<Table> {
    let format = format(path, data.format)?;
    let places = match format {
        Kind::Csv | Kind::Tsv | Kind::Jsonl => Places::Lines(Vec::new()),
        Kind::Parquet | Kind::Arrow => Places::Rows,
        Kind::Folders => Places::Files,
    };
    let table = Table { path: path.to_owned(), rows: Vec::new(), places };
    let mut reader = Reader { table, data, labelled };
    match format {
        Kind::Csv => reader.separated(b','),
        Kind::Tsv => reader.separated(b'\t'),
        Kind::Jsonl => reader.jsonl(),
        Kind::Parquet => reader.parquet(),
        Kind::Arrow => reader.arrow(),
        Kind::Folders => reader.folders(),
    }?;
    if reader.table.rows.is_empty() {
        return Err(user_error!("{} holds no rows", path.display()));
    }
    Ok(reader.table)
}

/// SHA-256 of what [`read`] would read: the file's bytes, or names and bytes of the folder's texts.
///
/// # Errors
/// As [`read`]'s for files that are not there.
pub fn content_hash(path: &Path, data: &Data) -> Result<String> {
    if format(path, data.format)? != Kind::Folders {
        return sha256_file(path);
    }
    let mut digest = Sha256::new();
    for (label, file) in folders::texts(path, true)? {
        let file_path = path.join(&file);
        regular(&file_path)?;
        let bytes = fs::read(&file_path).map_err(|e| user_error!("cannot read {}: {e}", file_path.display()))?;
        for piece in [label.unwrap_or_default().as_bytes(), file.as_bytes(), &bytes] {
            digest.update((piece.len() as u64).to_le_bytes());
            digest.update(piece);
        }
    }
    Ok(super::hex(&digest.finalize()))
}

/// [`Format`] with `Auto` resolved.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Csv,
    Tsv,
    Jsonl,
    Parquet,
    Arrow,
    Folders,
}

fn format(path: &Path, format: Format) -> Result<Kind> {
    let metadata = fs::metadata(path).map_err(|e| user_error!("cannot read data.source {}: {e}", path.display()))?;
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let resolved = match format {
        Format::Csv => Kind::Csv,
        Format::Tsv => Kind::Tsv,
        Format::Jsonl => Kind::Jsonl,
        Format::Parquet => Kind::Parquet,
        Format::Arrow => Kind::Arrow,
        Format::Folders => Kind::Folders,
        Format::Auto if metadata.is_dir() => Kind::Folders,
        Format::Auto => match extension.as_str() {
            "csv" => Kind::Csv,
            "tsv" | "tab" => Kind::Tsv,
            "jsonl" | "ndjson" => Kind::Jsonl,
            "parquet" => Kind::Parquet,
            "arrow" => Kind::Arrow,
            _ => {
                return Err(user_error!(
                    "{}: data.format = \"auto\" knows .csv .tsv .tab .jsonl .ndjson .parquet .arrow and folders, not \
                     {extension:?}; set data.format",
                    path.display()
                ));
            }
        },
    };
    if !metadata.is_dir() {
        regular(path)?;
    }
    if metadata.is_dir() != (resolved == Kind::Folders) {
        let (is, needs) = if metadata.is_dir() { ("a folder", "a file") } else { ("a file", "a folder") };
        return Err(user_error!("{} is {is}, and data.format needs {needs}", path.display()));
    }
    Ok(resolved)
}

/// Refuses what is read once and gone, or never ends: a source is read twice.
fn regular(path: &Path) -> Result<()> {
    let metadata = fs::metadata(path).map_err(|e| user_error!("cannot read {}: {e}", path.display()))?;
    if metadata.is_file() {
        return Ok(());
    }
    Err(user_error!("{} is no regular file; write what it gives into one", path.display()))
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| user_error!("cannot read {}: {e}", path.display()))
}

/// A value as the formats give it.
enum Cell<'a> {
    Missing,
    Text(&'a str),
    Integer(String),
    List,
    Other(String),
}

/// Indices of the columns that [`Data`] names.
struct Columns {
    text: usize,
    text_pair: Option<usize>,
    label: Option<usize>,
    id: Option<usize>,
}

struct Reader<'a> {
    table: Table,
    data: &'a Data,
    labelled: bool,
}

impl Reader<'_> {
    /// Finds the columns by name.
    fn columns(&self, names: &[String]) -> Result<Columns> {
        let find = |key: &str, name: &str| {
            let place = self.table.path.display().to_string();
            let found: Vec<usize> = (0..names.len()).filter(|&column| names[column] == name).collect();
            match found[..] {
                [] => Err(self.no_column(&place, key, name, names)),
                [column] => Ok(column),
                _ => Err(user_error!("{place}: {} columns are called {name:?} (data.{key}); rename one", found.len())),
            }
        };
        let data = self.data;
        Ok(Columns {
            text: find("text", &data.text)?,
            text_pair: data.text_pair.as_deref().map(|name| find("text_pair", name)).transpose()?,
            label: match find("label", &data.label) {
                Err(error) if self.labelled || names.contains(&data.label) => return Err(error),
                found => found.ok(),
            },
            id: data.id.as_deref().map(|name| find("id", name)).transpose()?,
        })
    }

    fn no_column(&self, place: &str, key: &str, name: &str, names: &[String]) -> anyhow::Error {
        let list: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
        let nearest = names
            .iter()
            .map(|have| (strsim::jaro_winkler(have, name), have))
            .filter(|(similarity, _)| *similarity > 0.6)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        let nearest = nearest.map_or(String::new(), |(_, have)| format!("; the nearest is {have:?}"));
        let list = if list.is_empty() { "none".to_owned() } else { list.join(", ") };
        user_error!("{place}: no column {name:?} (data.{key}); there are {list}{nearest}")
    }

    /// Checks one row and keeps it. `at` is its line, where the format has lines.
    fn push(
        &mut self,
        at: u64,
        text: Cell,
        text_pair: Option<Cell>,
        label: Option<Cell>,
        id: Option<Cell>,
    ) -> Result<()> {
        let i = self.table.rows.len();
        if let Places::Lines(lines) = &mut self.table.places {
            lines.push(at);
        }
        // The row goes in first so that `place` can speak of it.
        self.table.rows.push(Row { id: i.to_string(), ..Row::default() });
        if let Some(id) = id {
            self.table.rows[i].id = match id {
                Cell::Text(text) if !text.is_empty() => text.to_owned(),
                Cell::Integer(integer) => integer,
                other => return Err(self.unfit(i, "id", &self.data.id.clone().unwrap_or_default(), other)),
            };
        }
        self.table.rows[i].text = self.text(i, "text", &self.data.text, text)?;
        if let Some(cell) = text_pair {
            let column = self.data.text_pair.as_deref().unwrap_or_default();
            self.table.rows[i].text_pair = Some(self.text(i, "text_pair", column, cell)?);
        }
        self.table.rows[i].label = match label.unwrap_or(Cell::Missing) {
            Cell::Text(label) if !label.is_empty() => Some(label.to_owned()),
            Cell::Integer(label) => Some(label),
            Cell::Missing | Cell::Text(_) if !self.labelled => None,
            Cell::Missing | Cell::Text(_) => {
                return Err(user_error!(
                    "{}: no label in {:?}; label the row or drop it",
                    self.table.place(i),
                    self.data.label
                ));
            }
            Cell::List => {
                return Err(user_error!(
                    "{}: {:?} (data.label) is a list: kiln trains single-label classifiers, one string or integer a row",
                    self.table.place(i),
                    self.data.label
                ));
            }
            other => return Err(self.unfit(i, "label", &self.data.label, other)),
        };
        Ok(())
    }

    fn text(&self, i: usize, key: &str, column: &str, cell: Cell) -> Result<String> {
        match cell {
            Cell::Text(text) if !text.trim().is_empty() => Ok(text.to_owned()),
            Cell::Text(_) | Cell::Missing => {
                let place = self.table.place(i);
                Err(match self.table.places {
                    Places::Files => user_error!("{place}: empty text; fill or drop the file"),
                    _ => user_error!("{place}: empty text in {column:?} (data.{key}); fill or drop the row"),
                })
            }
            other => Err(self.unfit(i, key, column, other)),
        }
    }

    fn unfit(&self, i: usize, key: &str, column: &str, cell: Cell) -> anyhow::Error {
        let got = match cell {
            Cell::Missing => "nothing".to_owned(),
            Cell::Text(text) => format!("{text:?}"),
            Cell::Integer(integer) => integer,
            Cell::List => "a list".to_owned(),
            Cell::Other(other) => other,
        };
        let needs = if key.starts_with("text") { "a string" } else { "a string or an integer" };
        user_error!("{}: {column:?} (data.{key}) is {got}: needs {needs}", self.table.place(i))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::types::Int8Type;
    use arrow_array::{ArrayRef, DictionaryArray, Int64Array, RecordBatch, StringArray};
    use arrow_ipc::writer::{FileWriter, StreamWriter};

    use super::*;
    use crate::config::{Source, Split};

    fn data() -> Data {
        Data {
            source: Source::Sample,
            format: Format::Auto,
            text: "text".into(),
            text_pair: None,
            label: "label".into(),
            id: None,
            split: Split { validation: 0.1, test: 0.2, seed: 42 },
        }
    }

    /// Writes one file and reads it.
    fn read_bytes(name: &str, bytes: &[u8], data: &Data, labelled: bool) -> Result<Table> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        // The folder's name differs each time.
        let strip =
            |e: anyhow::Error| anyhow::anyhow!(format!("{e:#}").replace(&format!("{}/", folder.path().display()), ""));
        read(&path, data, labelled).map_err(strip)
    }

    fn error(name: &str, bytes: &[u8], data: &Data) -> String {
        read_bytes(name, bytes, data, true).err().map_or("no error".to_owned(), |e| e.to_string())
    }

    #[test]
    fn a_quote_that_is_not_closed_is_told_from_those_that_are() {
        for end in ["x,\"y\"", "x,\"y\"\n", "x,\"a \"\"b\"\"\"", "x,\"two\nlines\"\r\n", "x,5\" wide", "\"x\",a\"\"\n"]
        {
            let text = format!("text,label\na,\"b\"\n{end}");
            assert_eq!(read_bytes("a.csv", text.as_bytes(), &data(), true).unwrap().rows.len(), 2, "{end}");
        }
        for end in ["x,\"y", "x,\"y\n", "x,\"\"\"", "x,\"a \"\"b\"\"\nz,c\n"] {
            let text = format!("text,label\na,b\n{end}");
            assert!(error("a.csv", text.as_bytes(), &data()).starts_with("a.csv: line 3: a quote opens"), "{end}");
        }
    }

    #[test]
    fn all_formats_give_the_same_rows() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("a.csv"), "\u{feff}label,text\n7,\"two\nlines, \"\"quoted\"\"\"\n-1,π\n").unwrap();
        fs::write(path("a.tsv"), "text\tlabel\n\"two\nlines, \"\"quoted\"\"\"\t7\nπ\t-1\n").unwrap();
        let lines = "{\"text\": \"two\\nlines, \\\"quoted\\\"\", \"label\": 7}\n\n{\"label\": \"-1\", \"text\": \"π\"}";
        fs::write(path("a.jsonl"), lines).unwrap();
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["two\nlines, \"quoted\"", "π"]));
        let more: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
        let labels: DictionaryArray<Int8Type> = vec!["7", "-1"].into_iter().collect();
        let batch =
            RecordBatch::try_from_iter([("more", more), ("text", texts), ("label", Arc::new(labels) as ArrayRef)])
                .unwrap();
        let file = |name: &str| File::create(path(name)).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(file("a.parquet"), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let mut writer = StreamWriter::try_new(file("stream.arrow"), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        let mut writer = FileWriter::try_new(file("file.arrow"), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        for (label, name, text) in [("7", "1.txt", "two\nlines, \"quoted\""), ("-1", "0.txt", "π")] {
            fs::create_dir_all(path("texts").join(label)).unwrap();
            fs::write(path("texts").join(label).join(name), text).unwrap();
        }
        fs::write(path("texts").join("README.md"), "not a row").unwrap();

        let of = |name: &str| read(&path(name), &data(), true).unwrap().rows;
        let row = |id: &str, text: &str, label: &str| Row {
            id: id.into(),
            text: text.into(),
            label: Some(label.into()),
            ..Row::default()
        };
        let wanted = [row("0", "two\nlines, \"quoted\"", "7"), row("1", "π", "-1")];
        for name in ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "stream.arrow", "file.arrow"] {
            assert_eq!(of(name), wanted, "{name}");
        }
        let wanted = [row("-1/0.txt", "π", "-1"), row("7/1.txt", "two\nlines, \"quoted\"", "7")];
        assert_eq!(of("texts"), wanted);
    }

    #[test]
    fn pairs_and_ids_are_read() {
        let data = Data { text_pair: Some("b".into()), id: Some("key".into()), ..data() };
        let table = read_bytes("a.csv", b"key,text,b,label\nk1,one,two,x\n", &data, true).unwrap();
        let row = &table.rows[0];
        assert_eq!((row.id.as_str(), row.text_pair.as_deref()), ("k1", Some("two")));
    }

    #[test]
    fn rows_for_inference_need_no_label() {
        for (name, bytes) in
            [("a.csv", "text\none\n"), ("a.csv", "text,label\none,\n"), ("a.jsonl", "{\"text\": \"one\"}\n")]
        {
            assert_eq!(read_bytes(name, bytes.as_bytes(), &data(), false).unwrap().rows[0].label, None);
        }
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("one.txt"), "one").unwrap();
        assert_eq!(read_rows(folder.path(), &data()).unwrap()[0].id, "one.txt");
    }

    #[test]
    fn errors_name_file_and_row() {
        let data = data();
        let csv = |bytes: &[u8]| error("a.csv", bytes, &data);
        assert_eq!(
            csv(b"id,txt,label\n1,one,x\n"),
            "a.csv: no column \"text\" (data.text); there are \"id\", \"txt\", \"label\"; the nearest is \"txt\""
        );
        assert_eq!(
            csv(b"text,label\n\"a\nb\",x\nc,d,x\n"),
            "a.csv: line 4: 3 fields where the header has 2; a text with a delimiter, a quote or a line break needs quotes around it"
        );
        assert_eq!(
            csv(b"text,label\none,x\n \t,x\n"),
            "a.csv: line 3: empty text in \"text\" (data.text); fill or drop the row"
        );
        assert_eq!(csv(b"text,label\none,\n"), "a.csv: line 2: no label in \"label\"; label the row or drop it");
        assert_eq!(
            csv(b"text,label\none,x\ntw\xe9,x\n"),
            "a.csv: line 3: invalid UTF-8 at byte 2 of \"text\"; convert the file to UTF-8"
        );
        assert_eq!(csv(b"text,label\n"), "a.csv holds no rows");
        assert_eq!(csv(b""), "a.csv: no column \"text\" (data.text); there are none");

        let jsonl = |bytes: &[u8]| error("a.jsonl", bytes, &data);
        assert_eq!(
            jsonl(b"{\"text\": \"one\", \"label\": 1}\n{\"text\": \"\xff\"}\n"),
            "a.jsonl: line 2: invalid UTF-8 at byte 38 of the file; convert it to UTF-8"
        );
        assert!(jsonl(b"[1]\n").starts_with("a.jsonl: line 1: needs one JSON object a line: "));
        assert_eq!(
            jsonl(b"{\"text\": \"one\", \"labels\": \"x\"}\n"),
            "a.jsonl: line 1: no column \"label\" (data.label); there are \"text\", \"labels\"; the nearest is \"labels\""
        );
        assert_eq!(
            jsonl(b"{\"text\": \"one\", \"label\": [\"x\", \"y\"]}\n"),
            "a.jsonl: line 1: \"label\" (data.label) is a list: kiln trains single-label classifiers, one string or integer a row"
        );
        assert_eq!(
            jsonl(b"{\"text\": \"one\", \"label\": 1.5}\n"),
            "a.jsonl: line 1: \"label\" (data.label) is 1.5: needs a string or an integer"
        );
        assert_eq!(
            jsonl(b"{\"text\": 3, \"label\": 1}\n"),
            "a.jsonl: line 1: \"text\" (data.text) is 3: needs a string"
        );

        assert!(error("a.parquet", b"not parquet", &data).starts_with("cannot read a.parquet: "));
        assert!(error("a.arrow", b"not arrow", &data).starts_with("cannot read a.arrow: "));
        assert!(error("a.xlsx", b"", &data).contains("not \"xlsx\"; set data.format"));
        assert!(
            error("a.csv", b"", &Data { format: Format::Folders, ..data.clone() })
                .contains("is a file, and data.format needs a folder")
        );
    }

    #[test]
    fn errors_name_the_text_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = || format!("{:#}", read(folder.path(), &data(), true).err().unwrap());
        assert!(error().contains("holds no folders"));
        fs::create_dir(folder.path().join("a")).unwrap();
        assert!(error().ends_with("/a holds no .txt files"));
        fs::write(folder.path().join("a/1.txt"), b"caf\xe9").unwrap();
        assert!(error().ends_with("/a/1.txt: invalid UTF-8 at byte 3; convert it to UTF-8"), "{}", error());
        fs::write(folder.path().join("a/1.txt"), b"\n").unwrap();
        assert!(error().ends_with("/a/1.txt: empty text; fill or drop the file"), "{}", error());
    }
}
