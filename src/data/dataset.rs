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
use sha2::{Digest as _, Sha256};

use crate::config::hex;
use crate::error::guarded;
use crate::store::{read_json, sha256_file};

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
        // kiln's own folders say what their file should be; others are taken as they are.
        let card = dir.join("card.json");
        let sha256 =
            if card.exists() { read_json::<Value>(&card)?["sha256"].as_str().map(str::to_owned) } else { None };
        let mut dataset = Self { batches: Vec::new(), len: 0 };
        for file in files {
            let path = dir.join(file);
            let batches = verify(&path, sha256.as_deref()).and_then(|()| map(&path));
            for batch in
                batches.with_context(|| format!("{} is broken; delete its folder and prepare again", path.display()))?
            {
                let columns =
                    Batch::new(&batch, model).with_context(|| format!("cannot train on {}", path.display()))?;
                dataset.batches.push((dataset.len, columns));
                dataset.len += batch.num_rows();
            }
        }
        Ok(dataset)
    }

    /// A hash of every row's tokens and label, in their order.
    pub fn digest(&self) -> String {
        let row = |hash: Sha256, i: usize| {
            let ids = self.input_ids(i).iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>();
            let length = (ids.len() as u64).to_le_bytes();
            hash.chain_update(length).chain_update(ids).chain_update(self.label(i).unwrap_or(u32::MAX).to_le_bytes())
        };
        hex(&(0..self.len).fold(Sha256::new(), row).finalize())
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

    /// All labels' ids.
    ///
    /// # Errors
    /// An example has none.
    pub fn labels(&self) -> Result<Vec<u32>> {
        (0..self.len()).map(|i| self.label(i).with_context(|| format!("example {i} has no label"))).collect()
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

fn verify(path: &Path, sha256: Option<&str>) -> Result<()> {
    if let Some(wanted) = sha256 {
        let got = sha256_file(path)?;
        ensure!(got == wanted, "its SHA-256 is {got}, card.json says {wanted}");
    }
    Ok(())
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
    let mut decode = || -> Result<Vec<RecordBatch>> {
        let mut decoder = StreamDecoder::new();
        let mut batches = Vec::new();
        while !buffer.is_empty() {
            if let Some(batch) = decoder.decode(&mut buffer)? {
                batches.push(batch);
            }
        }
        decoder.finish()?;
        Ok(batches)
    };
    // arrow-ipc asserts that a message's buffers lie within it.
    guarded(&mut decode).unwrap_or_else(|| bail!("its messages contradict themselves"))
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

#[cfg(test)]
mod tests {
    use std::fs;

    use arrow_array::types::Int64Type;
    use arrow_array::{ArrayRef, Int64Array, ListArray};
    use arrow_ipc::writer::StreamWriter;

    use super::*;

    fn ids(rows: &[&[i32]]) -> ArrayRef {
        Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(
            rows.iter().map(|row| Some(row.iter().copied().map(Some).collect::<Vec<_>>())),
        ))
    }

    fn bytes(rows: &[&[i8]]) -> ArrayRef {
        Arc::new(ListArray::from_iter_primitive::<Int8Type, _, _>(
            rows.iter().map(|row| Some(row.iter().copied().map(Some).collect::<Vec<_>>())),
        ))
    }

    /// A folder as `datasets` writes one, of two equal batches.
    fn folder(columns: &[(&str, ArrayRef)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("state.json"), r#"{"_data_files": [{"filename": "a.arrow"}]}"#).unwrap();
        let batch = RecordBatch::try_from_iter(columns.iter().cloned()).unwrap();
        let file = File::create(folder.path().join("a.arrow")).unwrap();
        let mut writer = StreamWriter::try_new(file, &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        folder
    }

    fn labels(labels: &[i64]) -> ArrayRef {
        Arc::new(Int64Array::from(labels.to_vec()))
    }

    #[test]
    fn rows_are_slices_of_the_file() {
        let folder = folder(&[("input_ids", ids(&[&[1, 2, 3], &[4]])), ("labels", labels(&[0, 5]))]);
        let dataset = Dataset::open(folder.path()).unwrap();
        assert_eq!(dataset.len(), 4);
        assert_eq!([0, 1, 2, 3].map(|i| dataset.input_ids(i)), [&[1, 2, 3][..], &[4], &[1, 2, 3], &[4]]);
        assert_eq!([0, 1, 2, 3].map(|i| dataset.label(i)), [Some(0), Some(5), Some(0), Some(5)]);
        assert_eq!(dataset.token_type_ids(0), None);
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        if let Some(line) = maps.lines().find(|line| line.ends_with(&format!("{}/a.arrow", folder.path().display()))) {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let address = |hex| usize::from_str_radix(hex, 16).unwrap();
            for i in 0..4 {
                assert!((address(start)..address(end)).contains(&(dataset.input_ids(i).as_ptr() as usize)));
            }
        }
    }

    #[test]
    fn padding_is_left_out() {
        let folder = folder(&[
            ("input_ids", ids(&[&[1, 2, 0], &[4, 5, 6]])),
            ("token_type_ids", bytes(&[&[0, 1, 0], &[0, 1, 1]])),
            ("attention_mask", bytes(&[&[1, 1, 0], &[1, 1, 1]])),
        ]);
        let dataset = Dataset::open(folder.path()).unwrap();
        assert_eq!(dataset.input_ids(2), [1, 2]);
        assert_eq!(dataset.token_type_ids(0), Some(&[0, 1][..]));
        assert_eq!((dataset.length(0), dataset.length(1), dataset.label(1)), (2, 3, None));
    }

    #[test]
    fn columns_may_carry_a_models_name() {
        let one = folder(&[("minilm_input_ids", ids(&[&[1]])), ("labels", labels(&[3]))]);
        assert_eq!(Dataset::open(one.path()).unwrap().label(0), Some(3));
        let two = folder(&[("a_input_ids", ids(&[&[1]])), ("b_input_ids", ids(&[&[2]])), ("labels", labels(&[3]))]);
        assert_eq!(Dataset::open_model(two.path(), "b").unwrap().input_ids(0), [2]);
        assert!(format!("{:#}", Dataset::open(two.path()).unwrap_err()).contains("2 columns end in _input_ids"));
        assert!(
            format!("{:#}", Dataset::open_model(two.path(), "c").unwrap_err())
                .contains("no column input_ids; there are a_")
        );
    }

    #[test]
    fn other_columns_are_errors_that_name_the_file() {
        let long: ArrayRef =
            Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>([Some(vec![Some(1)]), Some(vec![Some(2)])]));
        let two = || ids(&[&[1, 2], &[3]]);
        for (columns, wanted) in [
            (vec![("text", labels(&[1, 2]))], "no column input_ids; there are text"),
            (vec![("input_ids", long)], "input_ids is List(Int64), needs a list of Int32"),
            (vec![("input_ids", ids(&[&[1], &[]]))], "a row holds no tokens"),
            (
                vec![("input_ids", two()), ("token_type_ids", bytes(&[&[0], &[0, 0]]))],
                "token_type_ids and input_ids differ",
            ),
            (
                vec![("input_ids", two()), ("attention_mask", bytes(&[&[0, 1], &[1]]))],
                "row 0: attention_mask is not ones",
            ),
            (vec![("input_ids", two()), ("labels", labels(&[0, -1]))], "labels holds a number that is no id"),
            (vec![("input_ids", two()), ("labels", ids(&[&[0], &[1]]))], "labels is List(Int32), needs Int64"),
        ] {
            let folder = folder(&columns);
            let error = format!("{:#}", Dataset::open(folder.path()).unwrap_err());
            assert!(error.contains("a.arrow") && error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn a_broken_file_is_an_error() {
        let columns = [("input_ids", ids(&[&[1, 2, 3], &[4]])), ("labels", labels(&[0, 5]))];
        let folder = folder(&columns);
        let path = folder.path().join("a.arrow");
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let error = format!("{:#}", Dataset::open(folder.path()).unwrap_err());
            assert!(error.contains("a.arrow is broken; delete its folder"), "{error}");
        }
        // Without a checksum a flipped bit may make another number; it must not end the process.
        for at in 0..whole.len() {
            for bit in [0, 3, 7] {
                let mut broken = whole.clone();
                broken[at] ^= 1 << bit;
                fs::write(&path, &broken).unwrap();
                if let Ok(dataset) = Dataset::open(folder.path()) {
                    (0..dataset.len()).for_each(|i| _ = (dataset.input_ids(i).len(), dataset.label(i)));
                }
            }
        }
        // With one it is seen.
        fs::write(&path, &whole).unwrap();
        let card =
            |sha256: &str| fs::write(folder.path().join("card.json"), format!(r#"{{"sha256": "{sha256}"}}"#)).unwrap();
        card(&sha256_file(&path).unwrap());
        Dataset::open(folder.path()).unwrap();
        card("0");
        assert!(format!("{:#}", Dataset::open(folder.path()).unwrap_err()).contains("card.json says 0"));
    }
}
