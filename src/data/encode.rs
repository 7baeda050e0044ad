//! Texts to token ids: in parallel, in order, into folders that Python's `datasets.load_from_disk`
//! opens and [`Dataset`] maps into memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use arrow_array::builder::{Int8Builder, Int32Builder, ListBuilder};
use arrow_array::{ArrayRef, Int64Array, RecordBatch};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Schema};
use rayon::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::{TruncationDirection, TruncationParams, TruncationStrategy};

use super::card::{EncodingCard, Lengths};
use super::snapshot::{publish, write_json};
use super::{Dataset, Part, Snapshot, Tokenizer, short_hash};
use crate::store::{self, read_json, stage};
use crate::user_error;

/// Part of every encoding's hash: what the same tokenizer makes of the same rows has changed where
/// this has.
const VERSION: u32 = 1;

/// Rows in a record batch, as `datasets` has them.
const BATCH: usize = 1000;

/// The file in each folder; `datasets` names it so.
const DATA_FILE: &str = "data-00000-of-00001.arrow";

/// One row as token ids, special tokens included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Ids in the tokenizer's vocabulary.
    pub input_ids: Vec<i32>,
    /// 0 in the first text, 1 in the second of a pair.
    pub token_type_ids: Vec<i8>,
}

/// Encoded parts of a snapshot.
#[derive(Clone, Debug)]
pub struct Encoding {
    hash: String,
    parts: Vec<(Part, PathBuf, EncodingCard)>,
}

impl Encoding {
    /// Names tokenizer, `max_length` and inputs; the folder's name.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The rows of a part, mapped into memory.
    ///
    /// # Errors
    /// The part was not encoded; its file is not what was written.
    pub fn dataset(&self, part: Part) -> Result<Dataset> {
        let (_, dir, card) = self.part(part)?;
        let dataset = Dataset::open(dir)?;
        if dataset.len() != card.rows {
            bail!(
                "{} holds {} rows, its card.json says {}; delete the folder",
                dir.display(),
                dataset.len(),
                card.rows
            );
        }
        Ok(dataset)
    }

    /// Lengths and truncation of a part.
    ///
    /// # Errors
    /// The part was not encoded.
    pub fn card(&self, part: Part) -> Result<&EncodingCard> {
        Ok(&self.part(part)?.2)
    }

    /// The folder of a part, for `datasets.load_from_disk`.
    ///
    /// # Errors
    /// The part was not encoded.
    pub fn dir(&self, part: Part) -> Result<&Path> {
        Ok(&self.part(part)?.1)
    }

    fn part(&self, part: Part) -> Result<&(Part, PathBuf, EncodingCard)> {
        self.parts.iter().find(|(of, ..)| *of == part).ok_or_else(|| anyhow!("the {part} part was not encoded"))
    }
}

impl Snapshot {
    /// Encodes parts with `tokenizer`, or finds them encoded. `inputs` are the columns, in the
    /// model's order: `input_ids`, `token_type_ids`, `attention_mask`.
    ///
    /// # Errors
    /// The user's: a part that is not here, a `max_length` that special tokens fill up. Files that
    /// cannot be read or written; of a part that fails nothing is left behind.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        max_length: usize,
        inputs: &[&str],
        parts: &[Part],
        threads: usize,
    ) -> Result<Encoding> {
        let hash = encoding_hash(tokenizer, max_length, inputs)?;
        for &part in parts {
            let dir = self.encoding_dir(&hash, part);
            if !dir.exists() {
                let encode = PartEncoder { snapshot: self, tokenizer, max_length, inputs, part, threads };
                let _writing = store::exclusive(self.dir(), true)?;
                let staged = stage(&dir)?;
                encode.write(staged.path(), &hash)?;
                publish(staged, &dir)?;
            }
        }
        self.open_encoding(hash, parts)
    }

    /// What [`encode`](Self::encode) made before, if it made all `parts`.
    ///
    /// # Errors
    /// An encoding that is broken.
    pub fn find_encoding(
        &self,
        tokenizer: &Tokenizer,
        max_length: usize,
        inputs: &[&str],
        parts: &[Part],
    ) -> Result<Option<Encoding>> {
        let hash = encoding_hash(tokenizer, max_length, inputs)?;
        let there = parts.iter().all(|&part| self.encoding_dir(&hash, part).exists());
        there.then(|| self.open_encoding(hash, parts)).transpose()
    }

    fn open_encoding(&self, hash: String, parts: &[Part]) -> Result<Encoding> {
        let open = |&part: &Part| {
            let dir = self.encoding_dir(&hash, part);
            let card = read_json(&dir.join("card.json"))?;
            Ok((part, dir, card))
        };
        let parts = parts.iter().map(open).collect::<Result<_>>()?;
        Ok(Encoding { hash, parts })
    }
}

fn encoding_hash(tokenizer: &Tokenizer, max_length: usize, inputs: &[&str]) -> Result<String> {
    let mut digest = Sha256::new();
    digest.update(serde_json::to_vec(&(VERSION, tokenizer.hash(), max_length, inputs))?);
    Ok(short_hash(digest))
}

/// Encodes texts, or pairs of them, in order.
///
/// # Errors
/// The user's, where special tokens fill up `max_length`; a text that the tokenizer fails on.
pub fn encode_texts(
    tokenizer: &Tokenizer,
    rows: &[(&str, Option<&str>)],
    max_length: usize,
    threads: usize,
) -> Result<Vec<Encoded>> {
    let paired = rows.iter().any(|(_, pair)| pair.is_some());
    Encoder::new(tokenizer, max_length, paired, threads)?.encode(rows)
}

/// A tokenizer that truncates, and threads for it.
struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    truncating: tokenizers::Tokenizer,
    max_length: usize,
    pool: rayon::ThreadPool,
}

impl<'a> Encoder<'a> {
    fn new(tokenizer: &'a Tokenizer, max_length: usize, paired: bool, threads: usize) -> Result<Self> {
        let added = tokenizer.added_tokens(paired);
        let needed = added + if paired { 2 } else { 1 };
        if max_length < needed {
            return Err(user_error!(
                "max_length = {max_length} leaves no room for text beside {added} special tokens: needs {needed}"
            ));
        }
        let mut truncating = tokenizer.inner.clone();
        let truncation = TruncationParams {
            max_length,
            strategy: TruncationStrategy::LongestFirst,
            direction: TruncationDirection::Right,
            stride: 0,
        };
        truncating.with_truncation(Some(truncation)).map_err(|e| anyhow!("{e}"))?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        Ok(Self { tokenizer, truncating, max_length, pool })
    }

    fn encode(&self, rows: &[(&str, Option<&str>)]) -> Result<Vec<Encoded>> {
        let encode = |&(text, pair): &(&str, Option<&str>)| Ok(encode(&self.truncating, text, pair)?.into());
        self.pool.install(|| rows.par_iter().map(encode).collect())
    }

    /// As [`encode`](Self::encode), each with its number of tokens before truncation.
    fn encode_and_measure(&self, rows: &[(&str, Option<&str>)]) -> Result<Vec<(Encoded, usize)>> {
        let whole = &self.tokenizer.inner;
        let encode = |&(text, pair): &(&str, Option<&str>)| match pair {
            // Tokenized once and cut afterwards: what is cut off has to be counted too.
            None => {
                let encoding = whole.encode_fast(text, false).map_err(|e| cannot_encode(text, e))?;
                let length = encoding.len() + self.tokenizer.added_tokens(false);
                let encoding =
                    self.truncating.post_process(encoding, None, true).map_err(|e| cannot_encode(text, e))?;
                Ok((encoding.into(), length))
            }
            // How a pair is cut depends on how far each text was read, so it is left to `encode`.
            Some(_) => {
                let encoding = encode(&self.truncating, text, pair)?;
                let is_full = encoding.len() == self.max_length;
                let length = if is_full { encode(whole, text, pair)?.len() } else { encoding.len() };
                Ok((encoding.into(), length))
            }
        };
        self.pool.install(|| rows.par_iter().map(encode).collect())
    }
}

impl From<tokenizers::Encoding> for Encoded {
    fn from(encoding: tokenizers::Encoding) -> Self {
        Encoded {
            input_ids: encoding.get_ids().iter().map(|&id| id as i32).collect(),
            token_type_ids: encoding.get_type_ids().iter().map(|&id| id as i8).collect(),
        }
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str, pair: Option<&str>) -> Result<tokenizers::Encoding> {
    let encoding = match pair {
        Some(pair) => tokenizer.encode_fast((text, pair), true),
        None => tokenizer.encode_fast(text, true),
    };
    encoding.map_err(|e| cannot_encode(text, e))
}

fn cannot_encode(text: &str, error: tokenizers::Error) -> anyhow::Error {
    anyhow!("the tokenizer fails on {:?}…: {error}", text.chars().take(40).collect::<String>())
}

/// One part on its way into its folder.
struct PartEncoder<'a> {
    snapshot: &'a Snapshot,
    tokenizer: &'a Tokenizer,
    max_length: usize,
    inputs: &'a [&'a str],
    part: Part,
    threads: usize,
}

impl PartEncoder<'_> {
    fn write(&self, folder: &Path, hash: &str) -> Result<()> {
        let rows = self.snapshot.rows(self.part)?;
        let paired = rows.iter().any(|row| row.text_pair.is_some());
        let encoder = Encoder::new(self.tokenizer, self.max_length, paired, self.threads)?;
        let features = self.features()?;
        let schema = Arc::new(self.schema(&features)?);
        let path = folder.join(DATA_FILE);
        let cannot = || format!("cannot write {}", path.display());
        let mut writer = StreamWriter::try_new(BufWriter::new(File::create(&path).with_context(cannot)?), &schema)?;
        let ids: HashMap<&str, i64> = self.snapshot.labels().iter().map(String::as_str).zip(0..).collect();
        let id_of = |label: Option<&str>| {
            let id = label.and_then(|label| ids.get(label)).copied();
            id.ok_or_else(|| anyhow!("label {label:?} of the {} part is not in id2label.json", self.part))
        };
        let mut lengths = Vec::with_capacity(rows.len());
        // Enough rows at once to keep the threads busy, few enough to hold.
        for rows in rows.chunks(16 * BATCH) {
            let texts: Vec<_> = rows.iter().map(|row| (row.text.as_str(), row.text_pair.as_deref())).collect();
            let (encoded, whole): (Vec<_>, Vec<_>) = encoder.encode_and_measure(&texts)?.into_iter().unzip();
            lengths.extend(whole);
            let labels = rows.iter().map(|row| id_of(row.label.as_deref())).collect::<Result<Vec<_>>>()?;
            for (encoded, labels) in encoded.chunks(BATCH).zip(labels.chunks(BATCH)) {
                let batch = RecordBatch::try_new(schema.clone(), self.columns(encoded, labels)?)?;
                writer.write(&batch).with_context(cannot)?;
            }
        }
        writer.finish().with_context(cannot)?;
        writer.into_inner()?.into_inner().map_err(|e| e.into_error()).with_context(cannot)?;
        let sha256 = store::sha256_file(&path)?;

        let mut fingerprint = Sha256::new();
        fingerprint.update(format!("{}/{hash}/{}", self.snapshot.hash(), self.part));
        write_json(
            &folder.join("state.json"),
            &json!({
                "_data_files": [{ "filename": DATA_FILE }],
                "_fingerprint": short_hash(fingerprint),
                "_format_columns": null,
                "_format_kwargs": {},
                "_format_type": null,
                "_output_all_columns": false,
                "_split": self.part,
            }),
        )?;
        write_json(
            &folder.join("dataset_info.json"),
            &json!({ "citation": "", "description": "", "features": features, "homepage": "", "license": "" }),
        )?;
        let card = EncodingCard {
            rows: rows.len(),
            sha256,
            tokenizer: self.tokenizer.hash().to_owned(),
            max_length: self.max_length,
            inputs: self.inputs.iter().map(|&input| input.to_owned()).collect(),
            truncated: lengths.iter().filter(|&&length| length > self.max_length).count(),
            tokens: Lengths::new(lengths),
        };
        write_json(&folder.join("card.json"), &card)
    }

    /// The columns as `datasets` describes them.
    fn features(&self) -> Result<Value> {
        let mut features = serde_json::Map::new();
        for &input in self.inputs {
            let dtype = match input {
                "input_ids" => "int32",
                "token_type_ids" | "attention_mask" => "int8",
                other => {
                    bail!("no encoding makes the input {other:?}: there are input_ids, token_type_ids, attention_mask")
                }
            };
            // `Sequence` is what every version of `datasets` reads.
            features.insert(
                input.to_owned(),
                json!({ "feature": { "dtype": dtype, "_type": "Value" }, "_type": "Sequence" }),
            );
        }
        features.insert("labels".to_owned(), json!({ "names": self.snapshot.labels(), "_type": "ClassLabel" }));
        Ok(features.into())
    }

    fn schema(&self, features: &Value) -> Result<Schema> {
        let list = |of| DataType::List(Arc::new(Field::new("item", of, true)));
        let mut fields: Vec<Field> = self
            .inputs
            .iter()
            .map(|&input| {
                Field::new(input, list(if input == "input_ids" { DataType::Int32 } else { DataType::Int8 }), true)
            })
            .collect();
        fields.push(Field::new("labels", DataType::Int64, true));
        let info = serde_json::to_string(&json!({ "info": { "features": features } }))?;
        Ok(Schema::new(fields).with_metadata(HashMap::from([("huggingface".to_owned(), info)])))
    }

    fn columns(&self, rows: &[Encoded], labels: &[i64]) -> Result<Vec<ArrayRef>> {
        let bytes = |of: &dyn Fn(&mut Int8Builder, &Encoded)| -> ArrayRef {
            let mut list = ListBuilder::new(Int8Builder::new());
            for row in rows {
                of(list.values(), row);
                list.append(true);
            }
            Arc::new(list.finish())
        };
        let mut columns: Vec<ArrayRef> = Vec::new();
        for &input in self.inputs {
            columns.push(match input {
                "input_ids" => {
                    let mut list = ListBuilder::new(Int32Builder::new());
                    for row in rows {
                        list.values().append_slice(&row.input_ids);
                        list.append(true);
                    }
                    Arc::new(list.finish())
                }
                "token_type_ids" => bytes(&|list, row| list.append_slice(&row.token_type_ids)),
                _ => bytes(&|list, row| list.append_value_n(1, row.input_ids.len())),
            });
        }
        columns.push(Arc::new(Int64Array::from(labels.to_vec())));
        Ok(columns)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use kiln_models::TokenizerKind;

    use super::*;
    use crate::config::Source;
    use crate::data::snapshot::tests::data;
    use crate::data::vocabulary::train;
    use crate::data::{prepare, sample};

    const INPUTS: [&str; 3] = ["input_ids", "token_type_ids", "attention_mask"];

    fn tokenizer() -> Tokenizer {
        let rows = sample::documents(1, 100);
        train(TokenizerKind::WordPiece, &rows.iter().map(|row| row.text.as_str()).collect::<Vec<_>>(), 800).unwrap()
    }

    #[test]
    fn rows_are_encoded_as_the_tokenizer_says() {
        let tokenizer = tokenizer();
        // Short enough that a few pairs stay whole.
        let mut rows = sample::documents(2, 61);
        rows.iter_mut().step_by(3).for_each(|row| row.text.truncate(40));
        let pairs: Vec<(&str, Option<&str>)> =
            rows.iter().zip(rows.iter().rev()).map(|(a, b)| (a.text.as_str(), Some(b.text.as_str()))).collect();
        let singles: Vec<(&str, Option<&str>)> = pairs.iter().map(|(text, _)| (*text, None)).collect();
        let mut truncating = tokenizer.inner.clone();
        truncating.with_truncation(Some(TruncationParams { max_length: 50, ..Default::default() })).unwrap();
        for rows in [singles, pairs] {
            let encoded = encode_texts(&tokenizer, &rows, 50, 2).unwrap();
            let encoder = Encoder::new(&tokenizer, 50, rows[0].1.is_some(), 2).unwrap();
            let (measured, lengths): (Vec<_>, Vec<_>) = encoder.encode_and_measure(&rows).unwrap().into_iter().unzip();
            assert_eq!(measured, encoded);
            for ((&(text, pair), encoded), length) in rows.iter().zip(&encoded).zip(&lengths) {
                let wanted = encode(&truncating, text, pair).unwrap();
                assert_eq!(wanted.get_ids().iter().map(|&id| id as i32).collect::<Vec<_>>(), encoded.input_ids);
                assert_eq!(
                    wanted.get_type_ids().iter().map(|&id| id as i8).collect::<Vec<_>>(),
                    encoded.token_type_ids
                );
                assert_eq!(encode(&tokenizer.inner, text, pair).unwrap().len(), *length);
            }
            assert!(lengths.iter().any(|&length| length > 50) && lengths.iter().any(|&length| length < 50));
        }
        let error = encode_texts(&tokenizer, &[("a", Some("b"))], 4, 1).unwrap_err().to_string();
        assert_eq!(error, "max_length = 4 leaves no room for text beside 3 special tokens: needs 5");
        assert!(encode_texts(&tokenizer, &[], 4, 1).unwrap().is_empty());
    }

    #[test]
    fn an_encoding_is_its_rows_in_order_for_any_threads() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("a.csv");
        sample::write(&source, 1, 1600).unwrap();
        let snapshot = prepare(&data(Source::Path(source)), &folder.path().join("data")).unwrap();
        let tokenizer = snapshot.scratch_tokenizer(TokenizerKind::WordPiece, 800).unwrap();
        let encode = |threads| snapshot.encode(&tokenizer, 64, &INPUTS, &Part::ALL, threads).unwrap();
        let encoding = encode(3);
        for part in Part::ALL {
            let (rows, dataset) = (snapshot.rows(part).unwrap(), encoding.dataset(part).unwrap());
            let texts: Vec<_> = rows.iter().map(|row| (row.text.as_str(), None)).collect();
            let encoded = encode_texts(&tokenizer, &texts, 64, 1).unwrap();
            assert_eq!(dataset.len(), rows.len());
            for (i, (row, encoded)) in rows.iter().zip(&encoded).enumerate() {
                assert_eq!(dataset.input_ids(i), encoded.input_ids);
                assert_eq!(dataset.token_type_ids(i).unwrap(), encoded.token_type_ids);
                assert_eq!(dataset.label(i), snapshot.label_id(row.label.as_deref().unwrap()));
                assert_eq!(dataset.length(i), encoded.input_ids.len());
            }
            let card = encoding.card(part).unwrap();
            let whole = encode_texts(&tokenizer, &texts, 10_000, 1).unwrap();
            assert_eq!(card.truncated, whole.iter().filter(|row| row.input_ids.len() > 64).count());
            assert_eq!(card.tokens.max, whole.iter().map(|row| row.input_ids.len()).max().unwrap());
        }
        assert!(encoding.dataset(Part::Train).unwrap().len() > BATCH);

        let file = snapshot.encoding_dir(encoding.hash(), Part::Train).join(DATA_FILE);
        let bytes = fs::read(&file).unwrap();
        fs::remove_dir_all(file.parent().unwrap()).unwrap();
        assert_eq!(encode(1).hash(), encoding.hash());
        assert!(fs::read(&file).unwrap() == bytes);
        assert_ne!(snapshot.encode(&tokenizer, 65, &INPUTS, &[Part::Test], 1).unwrap().hash(), encoding.hash());
        assert!(snapshot.encode(&tokenizer, 64, &["bbox"], &[Part::Test], 1).is_err());
    }
}
