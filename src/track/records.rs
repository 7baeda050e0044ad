//! An append-only file of whole records, which can be cut back to an earlier end.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A file that grows by whole records.
pub(super) struct RecordFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl RecordFile {
    /// Opens the file to append to, and makes it and its folder where there is none.
    pub fn open(path: &Path) -> Result<Self> {
        let attempt = || -> std::io::Result<Self> {
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            let len = file.metadata()?.len();
            Ok(Self { path: path.to_owned(), file, len })
        };
        attempt().with_context(|| format!("cannot open {} to append to it", path.display()))
    }

    /// Where the next record begins.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// All bytes.
    pub fn read(&self) -> Result<Vec<u8>> {
        fs::read(&self.path).with_context(|| format!("cannot read {}", self.path.display()))
    }

    /// Appends a record, handed to the system before this returns.
    pub fn append(&mut self, record: &[u8]) -> Result<()> {
        // One write, past any buffer: a reader or a crash sees the record or does not.
        self.file.write_all(record).with_context(|| format!("cannot append to {}", self.path.display()))?;
        self.len += record.len() as u64;
        Ok(())
    }

    /// Drops what comes after the first `len` bytes.
    pub fn truncate(&mut self, len: u64) -> Result<()> {
        if len < self.len {
            self.file.set_len(len).with_context(|| format!("cannot cut back {}", self.path.display()))?;
            self.len = len;
        }
        Ok(())
    }
}
