//! CSV and TSV, with a header.

use std::io::BufReader;

use anyhow::Result;

use super::{Cell, Reader, open};
use crate::data::count;
use crate::user_error;

impl Reader<'_> {
    pub(super) fn separated(&mut self, delimiter: u8) -> Result<()> {
        let path = self.table.path.clone();
        let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(BufReader::new(open(&path)?));
        let broken = |error: csv::Error| match error.kind() {
            csv::ErrorKind::UnequalLengths { pos, expected_len, len } => user_error!(
                "{}: line {}: {} where the header has {expected_len}; a text with a delimiter, a quote or a line break needs \
                 quotes around it",
                path.display(),
                pos.as_ref().map_or(0, csv::Position::line),
                count(*len as usize, "field"),
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
}
