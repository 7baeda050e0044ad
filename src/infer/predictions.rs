//! predictions.parquet: what a model says of each row.

use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use arrow_array::builder::{Float32Builder, ListBuilder, StringBuilder};
use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;

use crate::data::Row;
use crate::{metrics, store};

/// Rows in a record batch.
const BATCH: usize = 1000;

/// Writes `id`, `label` (null where the row has none), `prediction` and `probabilities` (in the order
/// of `labels`, at `temperature`) of each row, whose logits `[labels]` are `logits[row]`.
pub fn write(path: &Path, labels: &[String], rows: &[Row], logits: &[Vec<f32>], temperature: f64) -> Result<()> {
    let element = Arc::new(Field::new("item", DataType::Float32, false));
    let schema = Arc::new(Schema::new(vec![
        Field::new("id", DataType::Utf8, false),
        Field::new("label", DataType::Utf8, true),
        Field::new("prediction", DataType::Utf8, false),
        Field::new("probabilities", DataType::List(element.clone()), false),
    ]));
    let batch = |rows: &[Row], logits: &[Vec<f32>]| -> Result<RecordBatch> {
        let (mut ids, mut given, mut predictions) = (StringBuilder::new(), StringBuilder::new(), StringBuilder::new());
        let mut probabilities = ListBuilder::new(Float32Builder::new()).with_field(element.clone());
        for (row, logits) in rows.iter().zip(logits) {
            ids.append_value(&row.id);
            given.append_option(row.label.as_deref());
            predictions.append_value(&labels[metrics::argmax(logits)? as usize]);
            probabilities.values().append_slice(&metrics::softmax(logits, temperature));
            probabilities.append(true);
        }
        let columns = vec![
            Arc::new(ids.finish()) as _,
            Arc::new(given.finish()) as _,
            Arc::new(predictions.finish()) as _,
            Arc::new(probabilities.finish()) as _,
        ];
        let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
        Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &options)?)
    };
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    store::write(path, |file| {
        let mut writer = ArrowWriter::try_new(file, schema.clone(), Some(properties))?;
        for (rows, logits) in rows.chunks(BATCH).zip(logits.chunks(BATCH)) {
            writer.write(&batch(rows, logits).map_err(io::Error::other)?)?;
        }
        writer.close()?;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::read_predictions;

    #[test]
    fn rows_with_and_without_labels_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test/predictions.parquet");
        let labels = ["no", "yes"].map(String::from);
        let rows: Vec<Row> = (0..2500)
            .map(|i| Row { id: i.to_string(), label: (i % 2 == 0).then(|| "yes".into()), ..Row::default() })
            .collect();
        let logits: Vec<Vec<f32>> = (0..2500).map(|i| vec![0.0, if i < 2000 { 1.0 } else { -1000.0 }]).collect();
        write(&path, &labels, &rows, &logits, 1.0).unwrap();

        let read = || read_predictions(&path).unwrap();
        let back = read();
        assert!(back.iter().map(|p| (&p.id, &p.label)).eq(rows.iter().map(|row| (&row.id, &row.label))));
        assert_eq!((back[0].prediction.as_str(), back[2499].prediction.as_str()), ("yes", "no"));
        let expected = |temperature: f32| 1.0 / (1.0 + (-1.0 / temperature).exp());
        assert!((back[0].probabilities[1] - expected(1.0)).abs() < 1e-6);

        write(&path, &labels, &rows, &logits, 2.0).unwrap();
        assert!((read()[0].probabilities[1] - expected(2.0)).abs() < 1e-6);
        assert_eq!(read()[0].prediction, "yes");
        crate::data::rows::write_parquet(std::fs::File::create(&path).unwrap(), rows.iter()).unwrap();
        let error = format!("{:#}", read_predictions(&path).unwrap_err());
        assert!(error.contains("predictions.parquet: it has not the columns"), "{error}");
    }
}
