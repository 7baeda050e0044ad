//! Reads what the user has (CSV, TSV, JSONL, Parquet, Arrow, folders of text files) into [`Row`]s.
//!
//! Nothing is repaired in silence: a row that is broken, empty or without a label is an error that
//! names the file and the line, so that a number of rows here is the number of rows there.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use arrow_array::cast::AsArray;
use arrow_array::types::*;
use arrow_array::{Array, RecordBatch};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{DataType, Schema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use sha2::{Digest, Sha256};

use super::rows::Row;
use crate::config::{Data, Format};
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
    let mut digest = Sha256::new();
    if format(path, data.format)? == Kind::Folders {
        for (label, file) in texts(path, true)? {
            let bytes =
                fs::read(path.join(&file)).with_context(|| format!("cannot read {}", path.join(&file).display()))?;
            for piece in [label.unwrap_or_default().as_bytes(), file.as_bytes(), &bytes] {
                digest.update((piece.len() as u64).to_le_bytes());
                digest.update(piece);
            }
        }
    } else {
        let mut file = open(path)?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))? {
                0 => break,
                n => digest.update(&buffer[..n]),
            }
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
    if metadata.is_dir() != (resolved == Kind::Folders) {
        let (is, needs) = if metadata.is_dir() { ("a folder", "a file") } else { ("a file", "a folder") };
        return Err(user_error!("{} is {is}, and data.format needs {needs}", path.display()));
    }
    Ok(resolved)
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| user_error!("cannot read {}: {e}", path.display()))
}

/// The texts of a folder as (label, path in the folder), sorted by name: those in its folders, and,
/// where no labels are asked for, those in itself.
fn texts(folder: &Path, labelled: bool) -> Result<Vec<(Option<String>, String)>> {
    let mut found = Vec::new();
    let (folders, files) = entries(folder)?;
    if !labelled {
        found.extend(files.into_iter().map(|file| (None, file)));
    }
    if folders.is_empty() && found.is_empty() {
        return Err(user_error!(
            "{} holds no folders: format \"folders\" needs one for each label, with a .txt file for each row",
            folder.display()
        ));
    }
    for label in folders {
        let (_, files) = entries(&folder.join(&label))?;
        if files.is_empty() {
            return Err(user_error!("{} holds no .txt files", folder.join(&label).display()));
        }
        found.extend(files.into_iter().map(|file| (Some(label.clone()), format!("{label}/{file}"))));
    }
    Ok(found)
}

/// Names of the folders and of the .txt files in a folder, each sorted; hidden ones are left out.
fn entries(folder: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let cannot = |e| user_error!("cannot read {}: {e}", folder.display());
    let (mut folders, mut files) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let name = entry
            .file_name()
            .into_string()
            .map_err(|name| user_error!("{}: the name {name:?} is not UTF-8; rename it", folder.display()))?;
        if name.starts_with('.') {
        } else if entry.path().is_dir() {
            folders.push(name);
        } else if name.to_ascii_lowercase().ends_with(".txt") {
            files.push(name);
        }
    }
    folders.sort_unstable();
    files.sort_unstable();
    Ok((folders, files))
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
            names
                .iter()
                .position(|have| have == name)
                .ok_or_else(|| self.no_column(&self.table.path.display().to_string(), key, name, names))
        };
        let data = self.data;
        Ok(Columns {
            text: find("text", &data.text)?,
            text_pair: data.text_pair.as_deref().map(|name| find("text_pair", name)).transpose()?,
            label: match find("label", &data.label) {
                Err(error) if self.labelled => return Err(error),
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
        user_error!("{place}: no column {name:?} (data.{key}); there are {}{nearest}", list.join(", "))
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
                Err(user_error!("{}: empty text in {column:?} (data.{key}); fill or drop the row", self.table.place(i)))
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

    fn separated(&mut self, delimiter: u8) -> Result<()> {
        let path = self.table.path.clone();
        let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(BufReader::new(open(&path)?));
        let broken = |error: csv::Error| match error.kind() {
            csv::ErrorKind::UnequalLengths { pos, expected_len, len } => user_error!(
                "{}: line {}: {} where the header has {expected_len}; a text with a delimiter, a quote or a line break needs \
                 quotes around it",
                path.display(),
                pos.as_ref().map_or(0, csv::Position::line),
                super::count(*len as usize, "field"),
            ),
            _ => user_error!("cannot read {}: {error}", path.display()),
        };
        let names: Vec<String> = reader
            .byte_headers()
            .map_err(broken)?
            .iter()
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect();
        let columns = self.columns(&names)?;
        let mut record = csv::ByteRecord::new();
        while reader.read_byte_record(&mut record).map_err(broken)? {
            let line = record.position().map_or(0, csv::Position::line);
            let cell = |column: usize| {
                std::str::from_utf8(&record[column]).map(Cell::Text).map_err(|e| {
                    user_error!(
                        "{}: line {line}: invalid UTF-8 at byte {} of {:?}; convert the file to UTF-8",
                        path.display(),
                        e.valid_up_to(),
                        names[column]
                    )
                })
            };
            self.push(
                line,
                cell(columns.text)?,
                columns.text_pair.map(cell).transpose()?,
                columns.label.map(cell).transpose()?,
                columns.id.map(cell).transpose()?,
            )?;
        }
        Ok(())
    }

    fn jsonl(&mut self) -> Result<()> {
        use serde_json::{Map, Value};
        let path = self.table.path.clone();
        let mut file = BufReader::new(open(&path)?);
        let (mut bytes, mut offset, mut line) = (Vec::new(), 0, 0);
        loop {
            bytes.clear();
            let read = file.read_until(b'\n', &mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
            if read == 0 {
                return Ok(());
            }
            line += 1;
            let text = std::str::from_utf8(&bytes).map_err(|e| {
                let at = offset + e.valid_up_to() as u64;
                user_error!(
                    "{}: line {line}: invalid UTF-8 at byte {at} of the file; convert it to UTF-8",
                    path.display()
                )
            })?;
            offset += read as u64;
            let text = text.trim_start_matches('\u{feff}').trim();
            if text.is_empty() {
                continue;
            }
            let object: Map<String, Value> = serde_json::from_str(text)
                .map_err(|e| user_error!("{}: line {line}: needs one JSON object a line: {e}", path.display()))?;
            // Writers leave keys out, so each line is asked for its own.
            let place = format!("{}: line {line}", path.display());
            let get = |key: &str, name: &str| {
                object
                    .get(name)
                    .map(Cell::from)
                    .ok_or_else(|| self.no_column(&place, key, name, &object.keys().cloned().collect::<Vec<_>>()))
            };
            let data = self.data;
            let text = get("text", &data.text)?;
            let text_pair = data.text_pair.as_deref().map(|name| get("text_pair", name)).transpose()?;
            let label = match get("label", &data.label) {
                Err(error) if self.labelled => return Err(error),
                found => found.ok(),
            };
            let id = data.id.as_deref().map(|name| get("id", name)).transpose()?;
            self.push(line, text, text_pair, label, id)?;
        }
    }

    fn parquet(&mut self) -> Result<()> {
        let path = self.table.path.clone();
        let broken = |e: &dyn std::fmt::Display| user_error!("cannot read {}: {e}", path.display());
        let builder = ParquetRecordBatchReaderBuilder::try_new(open(&path)?).map_err(|e| broken(&e))?;
        let columns = self.columns(&names(builder.schema()))?;
        let wanted = [Some(columns.text), columns.text_pair, columns.label, columns.id];
        let mask = ProjectionMask::roots(builder.parquet_schema(), wanted.into_iter().flatten());
        for batch in builder.with_projection(mask).build().map_err(|e| broken(&e))? {
            self.batch(&batch.map_err(|e| broken(&e))?)?;
        }
        Ok(())
    }

    /// An Arrow file in either of its formats; `datasets` writes streams.
    fn arrow(&mut self) -> Result<()> {
        let path = self.table.path.clone();
        let broken = |e: &dyn std::fmt::Display| user_error!("cannot read {}: {e}", path.display());
        let mut file = open(&path)?;
        let mut magic = [0; 6];
        let is_file = file.read_exact(&mut magic).is_ok() && &magic == b"ARROW1";
        file.rewind().map_err(|e| broken(&e))?;
        let file = BufReader::new(file);
        let batches: Box<dyn Iterator<Item = Result<RecordBatch, arrow_schema::ArrowError>>> = if is_file {
            Box::new(FileReader::try_new(file, None).map_err(|e| broken(&e))?)
        } else {
            Box::new(StreamReader::try_new(file, None).map_err(|e| broken(&e))?)
        };
        for batch in batches {
            self.batch(&batch.map_err(|e| broken(&e))?)?;
        }
        Ok(())
    }

    fn batch(&mut self, batch: &RecordBatch) -> Result<()> {
        let columns = self.columns(&names(&batch.schema()))?;
        for i in 0..batch.num_rows() {
            let cell = |column: usize| cell(batch.column(column), i);
            self.push(
                0,
                cell(columns.text),
                columns.text_pair.map(cell),
                columns.label.map(cell),
                columns.id.map(cell),
            )?;
        }
        Ok(())
    }

    fn folders(&mut self) -> Result<()> {
        for (label, file) in texts(&self.table.path, self.labelled)? {
            let path = self.table.path.join(&file);
            let bytes = fs::read(&path).map_err(|e| user_error!("cannot read {}: {e}", path.display()))?;
            let text = std::str::from_utf8(&bytes).map_err(|e| {
                user_error!("{}: invalid UTF-8 at byte {}; convert it to UTF-8", path.display(), e.valid_up_to())
            })?;
            let text = text.trim_start_matches('\u{feff}');
            self.push(0, Cell::Text(text), None, label.as_deref().map(Cell::Text), Some(Cell::Text(&file)))?;
        }
        Ok(())
    }
}

fn names(schema: &Schema) -> Vec<String> {
    schema.fields().iter().map(|field| field.name().clone()).collect()
}

impl<'a> From<&'a serde_json::Value> for Cell<'a> {
    fn from(value: &'a serde_json::Value) -> Self {
        use serde_json::Value;
        match value {
            Value::Null => Cell::Missing,
            Value::String(text) => Cell::Text(text),
            Value::Number(number) if !number.is_f64() => Cell::Integer(number.to_string()),
            Value::Array(_) => Cell::List,
            other => Cell::Other(other.to_string()),
        }
    }
}

fn cell(array: &dyn Array, i: usize) -> Cell<'_> {
    macro_rules! integer {
        ($type:ty) => {
            Cell::Integer(array.as_primitive::<$type>().value(i).to_string())
        };
    }
    if array.is_null(i) {
        return Cell::Missing;
    }
    match array.data_type() {
        DataType::Utf8 => Cell::Text(array.as_string::<i32>().value(i)),
        DataType::LargeUtf8 => Cell::Text(array.as_string::<i64>().value(i)),
        DataType::Utf8View => Cell::Text(array.as_string_view().value(i)),
        DataType::Int8 => integer!(Int8Type),
        DataType::Int16 => integer!(Int16Type),
        DataType::Int32 => integer!(Int32Type),
        DataType::Int64 => integer!(Int64Type),
        DataType::UInt8 => integer!(UInt8Type),
        DataType::UInt16 => integer!(UInt16Type),
        DataType::UInt32 => integer!(UInt32Type),
        DataType::UInt64 => integer!(UInt64Type),
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..) => Cell::List,
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            match cell(dictionary.keys(), i) {
                Cell::Integer(key) => key.parse().map_or(Cell::Missing, |key| cell(dictionary.values(), key)),
                _ => Cell::Missing,
            }
        }
        other => Cell::Other(format!("of type {other}")),
    }
}
