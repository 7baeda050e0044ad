//! Parquet, and Arrow in both of its formats.

use std::io::{BufReader, Read, Seek};

use anyhow::Result;
use arrow_array::cast::AsArray;
use arrow_array::types::*;
use arrow_array::{Array, RecordBatch};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType, Schema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::{Cell, Reader, open};
use crate::error::guarded;
use crate::user_error;

impl Reader<'_> {
    pub(super) fn parquet(&mut self) -> Result<()> {
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
    pub(super) fn arrow(&mut self) -> Result<()> {
        let path = self.table.path.clone();
        let broken = |e: &dyn std::fmt::Display| user_error!("cannot read {}: {e}", path.display());
        let mut file = open(&path)?;
        let mut magic = [0; 6];
        let is_file = file.read_exact(&mut magic).is_ok() && &magic == b"ARROW1";
        file.rewind().map_err(|e| broken(&e))?;
        let file = BufReader::new(file);
        let open = || -> Result<Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>>>, ArrowError> {
            Ok(if is_file {
                Box::new(FileReader::try_new(file, None)?)
            } else {
                Box::new(StreamReader::try_new(file, None)?)
            })
        };
        // arrow-ipc asserts that a message's buffers lie within it.
        let contradicts = || broken(&"its messages contradict themselves");
        let mut batches = guarded(open).ok_or_else(contradicts)?.map_err(|e| broken(&e))?;
        while let Some(batch) = guarded(|| batches.next()).ok_or_else(contradicts)? {
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
}

fn names(schema: &Schema) -> Vec<String> {
    schema.fields().iter().map(|field| field.name().clone()).collect()
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
