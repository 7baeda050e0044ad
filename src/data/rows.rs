//! One row of data, and `rows.parquet`, which keeps a part's rows.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use arrow_array::builder::{Int32Builder, ListBuilder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::Int32Type;
use arrow_array::{Array, ArrayRef, RecordBatch, StringArray};
use arrow_schema::ArrowError;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;

/// A document, or a pair of them, and its label.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Names the row: the `id` column, else its number in the source, from 0, else (in a folder of
    /// text files) the file's path in the folder.
    pub id: String,
    /// The text.
    pub text: String,
    /// The second text, where rows are pairs.
    pub text_pair: Option<String>,
    /// The label; always there in a snapshot.
    pub label: Option<String>,
    /// The words of `text` with their places on the page; empty where the source has none.
    pub words: Vec<Word>,
}

/// A word on a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// The word.
    pub text: String,
    /// Left, top, right, bottom, each in 0..=1000 of the page.
    pub bbox: [i32; 4],
}

/// Rows written and read at once; small enough for Arrow's 32-bit offsets.
const BATCH: usize = 1000;

/// Writes rows as Parquet: `id`, `text`, `text_pair` (where rows are pairs), `label`, and `words`
/// with `boxes` (where rows have them).
///
/// # Errors
/// What the file system says.
pub fn write_parquet<'a>(
    file: impl Write + Send,
    rows: impl ExactSizeIterator<Item = &'a Row> + Clone,
) -> Result<(), ParquetError> {
    let paired = rows.clone().any(|row| row.text_pair.is_some());
    let placed = rows.clone().any(|row| !row.words.is_empty());
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let schema = batch(&[], paired, placed)?.schema();
    let mut writer = ArrowWriter::try_new(file, schema, Some(properties))?;
    let mut rows = rows.peekable();
    while rows.peek().is_some() {
        let chunk: Vec<&Row> = rows.by_ref().take(BATCH).collect();
        writer.write(&batch(&chunk, paired, placed)?)?;
    }
    writer.close()?;
    Ok(())
}

fn batch(rows: &[&Row], paired: bool, placed: bool) -> Result<RecordBatch, ArrowError> {
    let strings = |of: fn(&Row) -> Option<&str>| -> ArrayRef {
        Arc::new(rows.iter().map(|row| of(row)).collect::<StringArray>())
    };
    let mut columns = vec![
        ("id", strings(|row| Some(row.id.as_str())), false),
        ("text", strings(|row| Some(row.text.as_str())), false),
    ];
    if paired {
        columns.push(("text_pair", strings(|row| row.text_pair.as_deref()), true));
    }
    columns.push(("label", strings(|row| row.label.as_deref()), true));
    if placed {
        let mut words = ListBuilder::new(StringBuilder::new());
        let mut boxes = ListBuilder::new(ListBuilder::new(Int32Builder::new()));
        for row in rows {
            for word in &row.words {
                words.values().append_value(&word.text);
                boxes.values().values().append_slice(&word.bbox);
                boxes.values().append(true);
            }
            words.append(true);
            boxes.append(true);
        }
        columns.push(("words", Arc::new(words.finish()), true));
        columns.push(("boxes", Arc::new(boxes.finish()), true));
    }
    RecordBatch::try_from_iter_with_nullable(columns)
}

/// Reads what [`write_parquet`] wrote.
///
/// # Errors
/// The file cannot be read or has other columns.
pub fn read_parquet(path: &Path) -> Result<Vec<Row>> {
    read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn read(path: &Path) -> Result<Vec<Row>> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?.with_batch_size(BATCH).build()?;
    let mut rows = Vec::new();
    for batch in reader {
        let batch = batch?;
        let strings = |name: &str| {
            let column = batch.column_by_name(name)?.as_string_opt::<i32>()?;
            Some(column)
        };
        let needed = |name: &str| strings(name).ok_or_else(|| anyhow!("no string column {name:?}"));
        let (ids, texts, labels) = (needed("id")?, needed("text")?, needed("label")?);
        let pairs = strings("text_pair");
        let lists = |name: &str| batch.column_by_name(name).and_then(|column| column.as_list_opt::<i32>());
        for i in 0..batch.num_rows() {
            let value = |column: &StringArray| column.is_valid(i).then(|| column.value(i).to_owned());
            rows.push(Row {
                id: ids.value(i).to_owned(),
                text: texts.value(i).to_owned(),
                text_pair: pairs.and_then(value),
                label: value(labels),
                words: match (lists("words"), lists("boxes")) {
                    (Some(words), Some(boxes)) => {
                        placed(&words.value(i), &boxes.value(i)).ok_or_else(|| anyhow!("row {i}: not a word a box"))?
                    }
                    _ => Vec::new(),
                },
            });
        }
    }
    Ok(rows)
}

fn placed(words: &ArrayRef, boxes: &ArrayRef) -> Option<Vec<Word>> {
    let (words, boxes) = (words.as_string_opt::<i32>()?, boxes.as_list_opt::<i32>()?);
    if words.len() != boxes.len() {
        return None;
    }
    (0..words.len())
        .map(|i| {
            let bbox = boxes.value(i);
            let bbox = bbox.as_primitive_opt::<Int32Type>()?.values().as_ref().try_into().ok()?;
            Some(Word { text: words.value(i).to_owned(), bbox })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.parquet");
        let plain: Vec<Row> = (0..2500)
            .map(|i| Row {
                id: i.to_string(), text: format!("text {i}\nπ"), label: Some("a".into()), ..Row::default()
            })
            .collect();
        let mut full = plain.clone();
        full[7].text_pair = Some("pair".into());
        full[2400].words = vec![Word { text: "text".into(), bbox: [1, 2, 30, 4] }];
        for rows in [plain, full] {
            write_parquet(File::create(&path).unwrap(), rows.iter()).unwrap();
            assert_eq!(read_parquet(&path).unwrap(), rows);
        }
    }
}
