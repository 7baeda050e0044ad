use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use arrow_array::cast::AsArray;
use arrow_array::types::Float32Type;
use arrow_array::{Array, RecordBatch};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

/// A row of a predictions.parquet.
#[derive(Clone, Debug, PartialEq)]
pub struct Predicted {
    /// The row's id.
    pub id: String,
    /// Its label, where it has one.
    pub label: Option<String>,
    /// What the model predicted.
    pub prediction: String,
    /// The labels' probabilities, in id2label order.
    pub probabilities: Vec<f32>,
}

/// Reads a predictions.parquet.
///
/// # Errors
/// The file cannot be read or has other columns.
pub fn read_predictions(path: &Path) -> Result<Vec<Predicted>> {
    let read = || -> Result<Vec<Predicted>> {
        let mut rows = Vec::new();
        for batch in ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?.build()? {
            rows.extend(of_batch(&batch?).context("it has not the columns of a predictions.parquet")?);
        }
        Ok(rows)
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

fn of_batch(batch: &RecordBatch) -> Option<Vec<Predicted>> {
    let strings = |name: &str| batch.column_by_name(name)?.as_string_opt::<i32>();
    let (ids, labels, predictions) = (strings("id")?, strings("label")?, strings("prediction")?);
    let probabilities = batch.column_by_name("probabilities")?.as_list_opt::<i32>()?;
    let row = |i: usize| {
        Some(Predicted {
            id: ids.value(i).to_owned(),
            label: labels.is_valid(i).then(|| labels.value(i).to_owned()),
            prediction: predictions.value(i).to_owned(),
            probabilities: probabilities.value(i).as_primitive_opt::<Float32Type>()?.values().to_vec(),
        })
    };
    (0..batch.num_rows()).map(row).collect()
}
