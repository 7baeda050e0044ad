//! Encoded rows, mapped into memory: a row is a slice of the file.

use std::fs::File;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use arrow_array::cast::AsArray;
use arrow_array::types::{ArrowPrimitiveType, Int8Type, Int32Type, Int64Type};
use arrow_array::{Array, RecordBatch};
use arrow_buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow_ipc::reader::StreamDecoder;
use memmap2::Mmap;
use serde_json::Value;

use super::snapshot::read_json;

/// The rows of one part, as a `datasets` folder keeps them.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// By the first row each holds.
    batches: Vec<(usize, Batch)>,
    len: usize,
}

/// Columns of one record batch; they point into the file.
#[derive(Clone, Debug)]
struct Batch {
    input_ids: Lists<i32>,
    token_type_ids: Option<Lists<i8>>,
    /// Where rows are padded; kiln's own are not.
    attention_mask: Option<Lists<i8>>,
    labels: Option<ScalarBuffer<i64>>,
}

#[derive(Clone, Debug)]
struct Lists<T: arrow_buffer::ArrowNativeType> {
    offsets: OffsetBuffer<i32>,
    values: ScalarBuffer<T>,
}

impl<T: arrow_buffer::ArrowNativeType> Lists<T> {
    fn row(&self, i: usize) -> &[T] {
        &self.values[self.offsets[i] as usize..self.offsets[i + 1] as usize]
    }

    fn len(&self) -> usize {
        self.offsets.len() - 1
    }
}

/// One encoded text, without padding.
#[derive(Clone, Copy, Debug)]
pub struct Example<'a> {
    /// Token ids.
    pub input_ids: &'a [i32],
    /// Which text of a pair each token is of; all of the first where there are none.
    pub token_type_ids: Option<&'a [i8]>,
}

impl Dataset {
    /// Opens a folder of `datasets`: state.json and the Arrow streams that it names. Columns are
    /// `input_ids` (list of int32), and where there are any `token_type_ids` and `attention_mask`
    /// (list of int8) and `labels` (int64). They may carry a model's name, as `minilm_input_ids`,
    /// where there is one such model.
    ///
    /// # Errors
    /// A file that is not there, cut off, broken, or has other columns; the error names it.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::read(dir, None)
    }

    /// As [`open`](Self::open), of the columns that carry this model's name.
    ///
    /// # Errors
    /// As [`open`](Self::open)'s.
    pub fn open_model(dir: &Path, model: &str) -> Result<Self> {
        Self::read(dir, Some(model))
    }

    fn read(dir: &Path, model: Option<&str>) -> Result<Self> {
        let state: Value = read_json(&dir.join("state.json"))?;
        let files = state["_data_files"].as_array().into_iter().flatten().filter_map(|file| file["filename"].as_str());
        let mut dataset = Self { batches: Vec::new(), len: 0 };
        for file in files {
            let path = dir.join(file);
            for batch in map(&path)
                .with_context(|| format!("{} is broken; delete its folder and prepare again", path.display()))?
            {
                let columns =
                    Batch::new(&batch, model).with_context(|| format!("cannot train on {}", path.display()))?;
                dataset.batches.push((dataset.len, columns));
                dataset.len += batch.num_rows();
            }
        }
        Ok(dataset)
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The token ids of row `i`, without padding.
    ///
    /// # Panics
    /// `i` is not below [`len`](Self::len), as for the others.
    pub fn input_ids(&self, i: usize) -> &[i32] {
        let (batch, row) = self.locate(i);
        &batch.input_ids.row(row)[..batch.length(row)]
    }

    /// Which text of a pair each token is of.
    pub fn token_type_ids(&self, i: usize) -> Option<&[i8]> {
        let (batch, row) = self.locate(i);
        Some(&batch.token_type_ids.as_ref()?.row(row)[..batch.length(row)])
    }

    /// Row `i` as a model reads it.
    pub fn example(&self, i: usize) -> Example<'_> {
        Example { input_ids: self.input_ids(i), token_type_ids: self.token_type_ids(i) }
    }

    /// The label's id.
    pub fn label(&self, i: usize) -> Option<u32> {
        let (batch, row) = self.locate(i);
        Some(batch.labels.as_ref()?[row] as u32)
    }

    /// Tokens in row `i`, without padding.
    pub fn length(&self, i: usize) -> usize {
        let (batch, row) = self.locate(i);
        batch.length(row)
    }

    fn locate(&self, i: usize) -> (&Batch, usize) {
        assert!(i < self.len, "row {i} of {}", self.len);
        let (start, batch) = &self.batches[self.batches.partition_point(|(start, _)| *start <= i) - 1];
        (batch, i - start)
    }
}

/// The record batches of an Arrow stream, over the mapped file.
fn map(path: &Path) -> Result<Vec<RecordBatch>> {
    let file = File::open(path)?;
    // SAFETY: encodings are never written to again once they are renamed into place. Whoever cuts
    // such a file off while it is in use ends the process, as with any mapped file.
    let mapped = Arc::new(unsafe { Mmap::map(&file)? });
    let start = NonNull::new(mapped.as_ptr().cast_mut()).ok_or_else(|| anyhow!("it is empty"))?;
    let end_of_stream = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
    ensure!(mapped.ends_with(&end_of_stream), "it is cut off: the stream's end is missing");
    // SAFETY: the buffer holds the mapping for as long as it lives.
    let mut buffer = unsafe { Buffer::from_custom_allocation(start, mapped.len(), mapped) };
    let mut decoder = StreamDecoder::new();
    let mut batches = Vec::new();
    while !buffer.is_empty() {
        if let Some(batch) = decoder.decode(&mut buffer)? {
            batches.push(batch);
        }
    }
    decoder.finish()?;
    Ok(batches)
}

impl Batch {
    fn new(batch: &RecordBatch, model: Option<&str>) -> Result<Self> {
        let input_ids = lists::<Int32Type>(batch, "input_ids", model)?.ok_or_else(|| {
            let names: Vec<String> = batch.schema().fields().iter().map(|field| field.name().clone()).collect();
            anyhow!("no column input_ids; there are {}", names.join(", "))
        })?;
        let token_type_ids = lists::<Int8Type>(batch, "token_type_ids", model)?;
        let mut attention_mask = lists::<Int8Type>(batch, "attention_mask", model)?;
        if let Some(token_types) = &token_type_ids {
            ensure!(
                token_types.offsets.lengths().eq(input_ids.offsets.lengths()),
                "token_type_ids and input_ids differ in length"
            );
        }
        if let Some(mask) = &attention_mask {
            ensure!(
                mask.offsets.lengths().eq(input_ids.offsets.lengths()),
                "attention_mask and input_ids differ in length"
            );
            for row in 0..mask.len() {
                let mask = mask.row(row);
                let ones = mask.iter().take_while(|&&m| m == 1).count();
                ensure!(mask[ones..].iter().all(|&m| m == 0), "row {row}: attention_mask is not ones, then zeros");
            }
            if mask.values.iter().all(|&m| m == 1) {
                attention_mask = None;
            }
        }
        let labels = match column(batch, "labels", model)? {
            None => None,
            Some(column) => {
                let labels = column.as_primitive_opt::<Int64Type>();
                let labels = labels.ok_or_else(|| anyhow!("labels is {}, needs Int64", column.data_type()))?;
                ensure!(labels.null_count() == 0, "labels holds nulls");
                ensure!(
                    labels.values().iter().all(|&label| u32::try_from(label).is_ok()),
                    "labels holds a number that is no id"
                );
                Some(labels.values().clone())
            }
        };
        let batch = Self { input_ids, token_type_ids, attention_mask, labels };
        ensure!((0..batch.input_ids.len()).all(|row| batch.length(row) > 0), "a row holds no tokens");
        Ok(batch)
    }

    fn length(&self, row: usize) -> usize {
        match &self.attention_mask {
            None => self.input_ids.row(row).len(),
            Some(mask) => mask.row(row).iter().take_while(|&&m| m == 1).count(),
        }
    }
}

/// The column `name`, by itself or after a model's name.
fn column<'a>(batch: &'a RecordBatch, name: &str, model: Option<&str>) -> Result<Option<&'a dyn Array>> {
    if let Some(model) = model
        && let Some(column) = batch.column_by_name(&format!("{model}_{name}"))
    {
        return Ok(Some(column));
    }
    if let Some(column) = batch.column_by_name(name) {
        return Ok(Some(column));
    }
    if model.is_some() {
        return Ok(None);
    }
    let suffix = format!("_{name}");
    let schema = batch.schema();
    let found: Vec<usize> = schema
        .fields()
        .iter()
        .enumerate()
        .filter(|(_, field)| field.name().ends_with(&suffix))
        .map(|(i, _)| i)
        .collect();
    match found[..] {
        [] => Ok(None),
        [i] => Ok(Some(batch.column(i))),
        _ => bail!("{} columns end in {suffix}: open it for one model", found.len()),
    }
}

fn lists<T: ArrowPrimitiveType>(
    batch: &RecordBatch,
    name: &str,
    model: Option<&str>,
) -> Result<Option<Lists<T::Native>>> {
    let Some(column) = column(batch, name, model)? else { return Ok(None) };
    let list = column.as_list_opt::<i32>();
    let values = list.and_then(|list| list.values().as_primitive_opt::<T>());
    let (Some(list), Some(values)) = (list, values) else {
        bail!("{name} is {}, needs a list of {}", column.data_type(), T::DATA_TYPE);
    };
    ensure!(list.null_count() == 0 && values.null_count() == 0, "{name} holds nulls");
    Ok(Some(Lists { offsets: list.offsets().clone(), values: values.values().clone() }))
}
