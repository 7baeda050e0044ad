//! CSV and TSV, with a header.

use std::fs::File;
use std::io::{self, BufReader, Read as _, Seek as _, SeekFrom};

use anyhow::{Context as _, Result};

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
        let mut last = csv::Position::new();
        while reader.read_byte_record(&mut record).map_err(broken)? {
            last = record.position().cloned().unwrap_or(last);
            let line = last.line();
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
        let mut rest = open(&path)?;
        let open_quote = rest.seek(SeekFrom::Start(last.byte())).and_then(|_| ends_in_quotes(rest, delimiter));
        if open_quote.with_context(|| format!("cannot read {}", path.display()))? {
            return Err(user_error!(
                "{}: line {}: a quote opens here and is not closed: all that follows is taken for one text; close it, \
                 or write it twice where it is part of the text",
                path.display(),
                last.line()
            ));
        }
        Ok(())
    }
}

/// Whether a record, the file's last, ends within quotes, which the reader lets pass.
fn ends_in_quotes(record: File, delimiter: u8) -> io::Result<bool> {
    let (mut quoted, mut starts) = (false, true);
    for byte in BufReader::new(record).bytes() {
        let byte = byte?;
        match byte {
            // Two in a row leave the quotes and come back; one within a text without quotes is a text's.
            b'"' if quoted || starts => (quoted, starts) = (!quoted, quoted),
            _ => starts = !quoted && (byte == delimiter || byte == b'\n' || byte == b'\r'),
        }
    }
    Ok(quoted)
}
