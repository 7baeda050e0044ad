//! The rows of an experiment, fixed: read, freed of duplicates and split once, under the hash of
//! everything that decided them.
//!
//! ```text
//! <snapshot>/snapshot.json id2label.json card.json
//!   training/{train,validation}/rows.parquet    training/<encoding>/{train,validation}/
//!   test/rows.parquet                           test/<encoding>/
//! ```
//! A snapshot whose test/ is not there is whole for training.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kiln_models::TokenizerKind;
use parquet::errors::ParquetError;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::card::{Card, EncodingCard, Lengths, PartCard};
use super::rows::{self, Row};
use super::source::{self, Table};
use super::{Part, Tokenizer, sample, short_hash, split, vocabulary};
use crate::config::{Data, Source};
use crate::store::{self, read_json, stage};
use crate::user_error;

/// Part of every hash: what readers and splits do with the same source has changed where this has.
const VERSION: u32 = 1;

/// Rows that stay as they are.
#[derive(Clone, Debug)]
pub struct Snapshot {
    dir: PathBuf,
    manifest: Manifest,
    labels: Vec<String>,
    card: Card,
}

/// snapshot.json
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    snapshot: String,
    sources: Vec<SourceFile>,
    text: String,
    text_pair: Option<String>,
    label: String,
    id: Option<String>,
    split: crate::config::Split,
    /// Rows by part.
    rows: BTreeMap<Part, usize>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct SourceFile {
    part: Part,
    path: String,
    sha256: String,
}

/// Finds the snapshot of `data` in `dir` (an experiment's `data` folder), or makes it. What the user
/// should hear of it is written to stderr either way.
///
/// # Errors
/// The user's, as [`source::read`] and [`split::split`] have them; files that cannot be written.
/// Nothing is left behind then.
pub fn prepare(data: &Data, dir: &Path) -> Result<Snapshot> {
    let sources = sources(data)?;
    let hash = hash(&sources, data)?;
    let target = dir.join(&hash);
    if !target.join("snapshot.json").exists() {
        write(data, sources, hash, &target)?;
    }
    let snapshot = Snapshot::open(&target)?;
    for warning in snapshot.card.warnings() {
        crate::error::warn(format_args!("warning: {warning}"));
    }
    Ok(snapshot)
}

/// The snapshot of `data` in `dir`, where it was made before.
///
/// # Errors
/// A source that cannot be read; a snapshot that is broken.
pub fn find(data: &Data, dir: &Path) -> Result<Option<Snapshot>> {
    if !dir.exists() {
        return Ok(None); // without reading the sources
    }
    let target = dir.join(hash(&sources(data)?, data)?);
    target.join("snapshot.json").exists().then(|| Snapshot::open(&target)).transpose()
}

fn sources(data: &Data) -> Result<Vec<SourceFile>> {
    let sources: Vec<(Part, Option<&Path>)> = match &data.source {
        Source::Sample => vec![(Part::Train, None)],
        Source::Path(path) => vec![(Part::Train, Some(path))],
        Source::Parts { train, validation, test } => {
            let given =
                [(Part::Train, Some(train)), (Part::Validation, validation.as_ref()), (Part::Test, test.as_ref())];
            given.into_iter().filter_map(|(part, path)| path.map(|path| (part, Some(path.as_path())))).collect()
        }
    };
    sources
        .into_iter()
        .map(|(part, path)| {
            Ok(SourceFile {
                part,
                path: path.map_or("sample".to_owned(), |path| path.display().to_string()),
                sha256: path
                    .map_or_else(|| Ok(sample::content_hash(sample::SEED)), |path| source::content_hash(path, data))?,
            })
        })
        .collect()
}

/// Where a source lies plays no part: the same content is the same snapshot.
fn hash(sources: &[SourceFile], data: &Data) -> Result<String> {
    let sources: Vec<_> = sources.iter().map(|source| (source.part, &source.sha256)).collect();
    let decided_by = (VERSION, sources, data.format, &data.text, &data.text_pair, &data.label, &data.id, data.split);
    let mut digest = Sha256::new();
    digest.update(serde_json::to_vec(&decided_by)?);
    Ok(short_hash(digest))
}

fn write(data: &Data, sources: Vec<SourceFile>, hash: String, target: &Path) -> Result<()> {
    let tables: Vec<(Part, Table)> = sources
        .iter()
        .map(|file| {
            let table = match data.source {
                Source::Sample => Table::numbered(PathBuf::from("sample"), sample::rows(sample::SEED)),
                _ => source::read(Path::new(&file.path), data, true)?,
            };
            Ok((file.part, table))
        })
        .collect::<Result<_>>()?;
    let outcome = split::split(&tables, &data.split)?;

    let _writing = target.parent().map(|dir| store::exclusive(dir, false)).transpose()?;
    let staged = stage(target)?;
    let mut rows_by_part = BTreeMap::new();
    let mut parts = BTreeMap::new();
    for part in Part::ALL {
        let kept = &outcome.parts[part as usize];
        if kept.is_empty() {
            continue;
        }
        let rows = kept.iter().map(|&(table, row)| &tables[table].1.rows[row]);
        let folder = part_dir(staged.path(), part);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let path = folder.join("rows.parquet");
        File::create(&path)
            .map_err(ParquetError::from)
            .and_then(|file| rows::write_parquet(file, rows.clone()))
            .with_context(|| format!("cannot write {}", path.display()))?;
        rows_by_part.insert(part, kept.len());
        parts.insert(part.name().to_owned(), part_card(&outcome.labels, rows));
    }
    let manifest = Manifest {
        version: VERSION,
        snapshot: hash,
        sources,
        text: data.text.clone(),
        text_pair: data.text_pair.clone(),
        label: data.label.clone(),
        id: data.id.clone(),
        split: data.split,
        rows: rows_by_part,
    };
    let id2label: serde_json::Map<_, _> =
        outcome.labels.into_iter().enumerate().map(|(id, label)| (id.to_string(), label.into())).collect();
    write_json(&staged.path().join("snapshot.json"), &manifest)?;
    write_json(&staged.path().join("id2label.json"), &id2label)?;
    write_json(&staged.path().join("card.json"), &Card { parts, duplicates: outcome.duplicates })?;
    publish(staged, target)
}

fn part_card<'a>(labels: &[String], rows: impl ExactSizeIterator<Item = &'a Row> + Clone) -> PartCard {
    let mut by_label = vec![0usize; labels.len()];
    let ids: BTreeMap<&str, usize> = labels.iter().enumerate().map(|(id, label)| (label.as_str(), id)).collect();
    for row in rows.clone() {
        by_label[ids[row.label.as_deref().unwrap_or_default()]] += 1;
    }
    let words = |text: &str| text.split_whitespace().count();
    PartCard {
        rows: rows.len(),
        labels: labels.iter().cloned().zip(by_label.into_iter().map(Into::into)).collect(),
        words: Lengths::new(rows.map(|row| words(&row.text) + row.text_pair.as_deref().map_or(0, words)).collect()),
    }
}

/// The folder of a part's rows.
fn part_dir(snapshot: &Path, part: Part) -> PathBuf {
    match part {
        Part::Test => snapshot.join("test"),
        _ => snapshot.join("training").join(part.name()),
    }
}

impl Snapshot {
    /// Opens a snapshot's folder. Its test part may be absent, and is not touched.
    ///
    /// # Errors
    /// The user's where `dir` is no snapshot.
    pub fn open(dir: &Path) -> Result<Snapshot> {
        if !dir.join("snapshot.json").exists() {
            return Err(user_error!(
                "{} is no prepared snapshot: it has no snapshot.json; make one with kiln prepare",
                dir.display()
            ));
        }
        let manifest: Manifest = read_json(&dir.join("snapshot.json"))?;
        let id2label: BTreeMap<usize, String> = read_json(&dir.join("id2label.json"))?;
        let labels: Vec<String> = id2label.values().cloned().collect();
        if !id2label.keys().copied().eq(0..labels.len()) {
            return Err(user_error!("{}: the ids do not count from 0", dir.join("id2label.json").display()));
        }
        let card = read_json(&dir.join("card.json"))?;
        Ok(Snapshot { dir: dir.to_owned(), manifest, labels, card })
    }

    /// The hash of what the rows came from; the folder's name in an experiment.
    pub fn hash(&self) -> &str {
        &self.manifest.snapshot
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Labels in the order of their ids.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The data card.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Whether the part's rows lie here.
    pub fn has(&self, part: Part) -> bool {
        self.rows_path(part).exists()
    }

    /// Rows of a part, each with a label, in the source's order.
    ///
    /// # Errors
    /// The user's where the part is not here; a file that cannot be read.
    pub fn rows(&self, part: Part) -> Result<Vec<Row>> {
        let path = self.rows_path(part);
        if !path.exists() {
            return Err(user_error!("snapshot {} has no {part} part: no {}", self.hash(), path.display()));
        }
        let rows = rows::read_parquet(&path)?;
        let expected = self.manifest.rows.get(&part).copied().unwrap_or(rows.len());
        anyhow::ensure!(
            rows.len() == expected,
            "{} holds {} rows, snapshot.json says {expected}",
            path.display(),
            rows.len()
        );
        Ok(rows)
    }

    fn rows_path(&self, part: Part) -> PathBuf {
        part_dir(&self.dir, part).join("rows.parquet")
    }

    /// The id of a label in [`labels`](Self::labels).
    pub fn label_id(&self, label: &str) -> Option<u32> {
        self.labels.iter().position(|have| have == label).map(|id| id as u32)
    }

    /// The folder of a part's encoding.
    pub(super) fn encoding_dir(&self, encoding: &str, part: Part) -> PathBuf {
        match part {
            Part::Test => self.dir.join("test").join(encoding),
            _ => self.dir.join("training").join(encoding).join(part.name()),
        }
    }

    /// The cards of a part's encodings, whichever models they are of; those that cannot be read are left out.
    pub fn encoding_cards(&self, part: Part) -> Vec<EncodingCard> {
        let folder = self.dir.join(if part == Part::Test { "test" } else { "training" });
        let encodings = fs::read_dir(folder).into_iter().flatten().flatten();
        let names = encodings.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|name| read_json(&self.encoding_dir(&name, part).join("card.json")).ok()).collect()
    }

    /// A tokenizer trained on the train part alone; the same bytes every time. It is kept in the
    /// snapshot, and read from there the next time.
    ///
    /// # Errors
    /// The user's where `vocab_size` does not hold the alphabet; files that cannot be read or written.
    pub fn scratch_tokenizer(&self, kind: TokenizerKind, vocab_size: usize) -> Result<Tokenizer> {
        let folder = self.scratch_tokenizer_dir(kind, vocab_size);
        if !folder.exists() {
            let _writing = store::exclusive(&self.dir, true)?;
            let rows = self.rows(Part::Train)?;
            let texts = rows.iter().flat_map(|row| [Some(row.text.as_str()), row.text_pair.as_deref()]).flatten();
            let staged = stage(&folder)?;
            vocabulary::train(kind, &texts.collect::<Vec<_>>(), vocab_size)?.save(staged.path())?;
            publish(staged, &folder)?;
        }
        Tokenizer::from_folder(&folder)
    }

    /// The folder of [`scratch_tokenizer`](Self::scratch_tokenizer), made or not.
    pub fn scratch_tokenizer_dir(&self, kind: TokenizerKind, vocab_size: usize) -> PathBuf {
        self.dir.join("training").join(format!("tokenizer-{}-{vocab_size}", kind.name()))
    }
}

/// Makes a staged folder appear whole at `target`. Where another process has made it meanwhile, its
/// folder stays, for it may be mapped: equal names here mean equal content.
pub(super) fn publish(staged: TempDir, target: &Path) -> Result<()> {
    if target.exists() { Ok(()) } else { store::publish(staged, target) }
}

/// Writes a file of a staged folder, which is synced as a whole.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::{Format, Split};

    /// The configuration of a CSV file with the columns text and label.
    pub(in crate::data) fn data(source: Source) -> Data {
        Data {
            source,
            format: Format::Auto,
            text: "text".into(),
            text_pair: None,
            label: "label".into(),
            id: None,
            split: Split { validation: 0.1, test: 0.2, seed: 42 },
        }
    }

    fn csv(path: &Path, rows: usize) {
        let rows: String = (0..rows).map(|i| format!("text {i},{}\n", ["b", "a"][i % 2])).collect();
        fs::write(path, format!("text,label\n{rows}")).unwrap();
    }

    fn files(folder: &Path) -> Vec<String> {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files.extend(self::files(&path));
            } else {
                files.push(path.display().to_string());
            }
        }
        files.sort();
        files
    }

    #[test]
    fn a_snapshot_is_made_once_and_follows_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        csv(&path("one.csv"), 40);
        let dir = path("data");
        let first = prepare(&data(Source::Path(path("one.csv"))), &dir).unwrap();
        assert_eq!(first.labels(), ["a", "b"]);
        assert_eq!(first.dir(), dir.join(first.hash()));
        assert_eq!(Part::ALL.map(|part| first.rows(part).unwrap().len()), [28, 4, 8]);
        assert_eq!(first.label_id("b"), Some(1));
        let id2label = fs::read_to_string(first.dir().join("id2label.json")).unwrap();
        assert_eq!(id2label, "{\n  \"0\": \"a\",\n  \"1\": \"b\"\n}\n");
        let made =
            |snapshot: &Snapshot| fs::metadata(snapshot.dir().join("snapshot.json")).unwrap().modified().unwrap();
        let when = made(&first);

        fs::rename(path("one.csv"), path("two.csv")).unwrap();
        let moved = prepare(&data(Source::Path(path("two.csv"))), &dir).unwrap();
        assert_eq!((moved.hash(), made(&moved)), (first.hash(), when));

        let mut other_split = data(Source::Path(path("two.csv")));
        other_split.split.seed = 43;
        assert_ne!(prepare(&other_split, &dir).unwrap().hash(), first.hash());
        csv(&path("two.csv"), 42);
        assert_ne!(prepare(&data(Source::Path(path("two.csv"))), &dir).unwrap().hash(), first.hash());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 4); // and .lock
    }

    #[test]
    fn training_needs_no_test_part() {
        let folder = tempfile::tempdir().unwrap();
        csv(&folder.path().join("a.csv"), 40);
        let snapshot = prepare(&data(Source::Path(folder.path().join("a.csv"))), &folder.path().join("data")).unwrap();
        fs::remove_dir_all(snapshot.dir().join("test")).unwrap();
        let snapshot = Snapshot::open(snapshot.dir()).unwrap();
        assert!(snapshot.has(Part::Train) && snapshot.has(Part::Validation) && !snapshot.has(Part::Test));
        let tokenizer = snapshot.scratch_tokenizer(TokenizerKind::WordPiece, 200).unwrap();
        snapshot.encode(&tokenizer, 16, &["input_ids"], &[Part::Train, Part::Validation], 1).unwrap();
        let error = snapshot.encode(&tokenizer, 16, &["input_ids"], &[Part::Test], 1).unwrap_err();
        assert!(error.to_string().contains("has no test part"), "{error}");
        assert!(!snapshot.dir().join("test").join("rows.parquet").exists());
    }

    #[test]
    fn an_error_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        fs::write(folder.path().join("a.csv"), "text,label\none,a\ntwo,b\n").unwrap();
        let error = prepare(&data(Source::Path(folder.path().join("a.csv"))), &dir).unwrap_err();
        assert!(error.to_string().contains("needs 2; drop the label"), "{error}");
        assert_eq!(files(&dir), [""; 0]);
        let error = prepare(&data(Source::Path(folder.path().join("b.csv"))), &dir).unwrap_err();
        assert!(error.to_string().contains("b.csv: No such file"), "{error}");
        assert!(Snapshot::open(&dir).unwrap_err().to_string().contains("is no prepared snapshot"));
    }
}
