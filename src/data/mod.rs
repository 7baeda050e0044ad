//! From files to memory-mapped token ids.
//!
//! [`source`] reads files into [`Row`]s, [`split`] removes duplicates and cuts the parts,
//! [`snapshot`] writes them once under the hash of what they came from, [`encode`] turns a part into
//! Arrow by a [`Tokenizer`], which [`vocabulary`] trains where there is none, and [`dataset`] maps that into memory for training, which [`sampler`] cuts into batches.

pub mod card;
pub mod dataset;
pub mod encode;
pub mod rows;
pub mod sample;
pub mod sampler;
pub mod snapshot;
pub mod source;
pub mod split;
pub mod tokenizer;
pub mod vocabulary;

pub use card::Card;
pub use dataset::{Dataset, Example};
pub use encode::{Encoded, Encoding, encode_texts};
pub use rows::{Row, Word};
pub use snapshot::{Snapshot, find, prepare};
pub use source::read_rows;
pub use tokenizer::Tokenizer;

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What a row is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Rows to train on.
    Train,
    /// Rows that choose the best checkpoint and the best model.
    Validation,
    /// Rows that training never reads.
    Test,
}

impl Part {
    /// All three, in the order they are made.
    pub const ALL: [Part; 3] = [Part::Train, Part::Validation, Part::Test];

    /// Its name in folders and files.
    pub fn name(self) -> &'static str {
        match self {
            Part::Train => "train",
            Part::Validation => "validation",
            Part::Test => "test",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The first 16 hexadecimal digits of a SHA-256: enough for a folder's name.
fn short_hash(digest: Sha256) -> String {
    hex(&digest.finalize()[..8])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `1 row`, `2 rows`.
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}
