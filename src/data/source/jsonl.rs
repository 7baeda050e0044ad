//! One JSON object a line.

use std::io::{BufRead, BufReader};

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use super::{Cell, Reader, open};
use crate::user_error;

impl Reader<'_> {
    pub(super) fn jsonl(&mut self) -> Result<()> {
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
}

impl<'a> From<&'a Value> for Cell<'a> {
    fn from(value: &'a Value) -> Self {
        match value {
            Value::Null => Cell::Missing,
            Value::String(text) => Cell::Text(text),
            Value::Number(number) if !number.is_f64() => Cell::Integer(number.to_string()),
            Value::Array(_) => Cell::List,
            other => Cell::Other(other.to_string()),
        }
    }
}
