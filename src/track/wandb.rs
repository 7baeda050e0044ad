//! Weights & Biases: a folder in the form of its offline runs, which `wandb sync` uploads.
//!
//! `<model>/wandb/offline-run-<time>-<id>/run-<id>.wandb` holds wandb_internal.proto's `Record`s in
//! LevelDB's log format: blocks of 32 KiB, in each of which fragments of records stand with
//! CRC-32 (u32) · length (u16) · kind (u8) · data, little-endian. One file holds the whole run, however many
//! processes trained it, with one row of history for each step.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use prost::Message;
use sha2::{Digest as _, Sha256};

use super::Sink;
use super::event::{Event, Start};
use super::records::RecordFile;
use super::wandb_proto::{
    ConfigRecord, ExitRecord, HeaderRecord, HistoryRecord, HistoryStep, Item, Kind, Record, RunRecord, SummaryRecord,
    Timestamp, VersionInfo,
};
use crate::config::hex;
use crate::store::{self, Status};

/// Where a run goes, resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    /// The project; `None` is the experiment's name.
    pub project: Option<String>,
    /// The user or team; `None` is that of who syncs the run.
    pub entity: Option<String>,
}

/// An offline run that is being written.
pub(super) struct Wandb {
    folder: PathBuf,
    settings: Settings,
    open: Option<Open>,
}

struct Open {
    file: RecordFile,
    id: String,
    started: f64,
    time: f64,
    /// Records so far.
    number: i64,
    /// The last row: where it stands, and what it says.
    row: Option<(u64, u64, Vec<Item>)>,
}

impl Wandb {
    /// A run below a model's folder; nothing is opened yet.
    pub fn new(dir: &Path, settings: Settings) -> Self {
        Self { folder: dir.join("wandb"), settings, open: None }
    }

    /// The run's file and its id: the one that is there, or a new one.
    fn find(&self) -> Result<(PathBuf, String)> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut ids: Vec<_> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let (_, id) = name.strip_prefix("offline-run-")?.split_once('-')?;
                Some((entry.path(), id.to_owned()))
            })
            .collect();
        ids.sort();
        let (folder, id) = match ids.into_iter().next() {
            Some(found) => found,
            None => {
                let now = super::event::now();
                let place = std::path::absolute(&self.folder).with_context(|| self.folder.display().to_string())?;
                let id = hex(&Sha256::digest(format!("{} {} {now}", store::host(), place.display())))[..8].to_owned();
                (self.folder.join(format!("offline-run-{}-{id}", date_time(now as u64))), id)
            }
        };
        fs::create_dir_all(folder.join("files")).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok((folder.join(format!("run-{id}.wandb")), id))
    }
}

impl Sink for Wandb {
    fn cut_back(&mut self, step: u64) -> Result<()> {
        let (path, id) = self.find()?;
        let mut open = Open { file: RecordFile::open(&path)?, id, started: 0.0, time: 0.0, number: 0, row: None };
        let mut end = 0;
        for (after, data) in records(&open.file.read()?) {
            let Ok(record) = Record::decode(&data[..]) else { break };
            match &record.kind {
                Some(Kind::Exit(_)) => break,
                Some(Kind::History(HistoryRecord { step: Some(row), .. })) if row.num as u64 > step => break,
                // A row's summary stands before it, and the test's at the end.
                Some(Kind::Summary(summary)) if summary.step().is_none_or(|row| row > step) => break,
                Some(Kind::Run(run)) => open.started = run.start_time.map_or(0.0, Timestamp::seconds),
                _ => {}
            }
            (end, open.number) = (after, record.num);
        }
        open.file.truncate(end)?;
        self.open = Some(open);
        Ok(())
    }

    fn append(&mut self, event: &Event) -> Result<()> {
        let open = self.open.as_mut().context("cut_back opens the file")?;
        open.time = event.time().unwrap_or(open.time);
        match event {
            Event::Start(start) if open.number == 0 => open.begin(start, &self.settings),
            Event::Start(_) => Ok(()),
            _ if open.number == 0 => Ok(()), // W&B was asked for after the training
            Event::Step(_) | Event::Evaluation(_) => open.row(event),
            Event::Test(_) => {
                let update = event.figures().into_iter().map(|(name, value)| Item::figure(name, value)).collect();
                open.write(Kind::Summary(SummaryRecord { update }))
            }
            Event::End(end) => match end.status {
                // What has no end, as a process that was killed, can go on.
                Status::Interrupted | Status::Training => Ok(()),
                Status::Finished | Status::Stopped => open.exit(0),
                Status::Failed => open.exit(1),
            },
        }
    }
}

impl Open {
    fn begin(&mut self, start: &Start, settings: &Settings) -> Result<()> {
        self.started = start.time;
        let producer = format!("kiln {}", env!("CARGO_PKG_VERSION"));
        let version_info = Some(VersionInfo { producer, min_consumer: "0.40.0".into() });
        self.write(Kind::Header(HeaderRecord { version_info }))?;
        let config = start.config.as_object().into_iter().flatten();
        let update = config.map(|(key, value)| Item::new(key, value.to_string())).collect();
        self.write(Kind::Run(RunRecord {
            run_id: self.id.clone(),
            entity: settings.entity.clone().unwrap_or_default(),
            project: settings.project.clone().unwrap_or_else(|| start.experiment.clone()),
            config: Some(ConfigRecord { update }),
            run_group: start.run_num.to_string(),
            job_type: "training".into(),
            display_name: start.model.clone(),
            host: store::host(),
            start_time: Some(Timestamp::new(start.time)),
        }))
    }

    /// Writes a step's row, or writes it again with what was evaluated after the step.
    fn row(&mut self, event: &Event) -> Result<()> {
        let figures = event.figures().into_iter().map(|(name, value)| Item::figure(name, value));
        let step = event.step();
        let (begin, items) = match self.row.take() {
            Some((begin, last, mut items)) if last == step => {
                self.file.truncate(begin)?;
                self.number -= 2;
                items.extend(figures);
                (begin, items)
            }
            _ => {
                let clock = [
                    Item::new("_step", step.to_string()),
                    Item::figure("_timestamp", self.time),
                    Item::figure("_runtime", (self.time - self.started).max(0.0)),
                ];
                (self.file.len(), clock.into_iter().chain(figures).collect())
            }
        };
        // The summary is the newest value of each figure.
        self.write(Kind::Summary(SummaryRecord { update: items.clone() }))?;
        let row = HistoryRecord { item: items.clone(), step: Some(HistoryStep { num: step as i64 }) };
        self.write(Kind::History(row))?;
        self.row = Some((begin, step, items));
        Ok(())
    }

    fn exit(&mut self, exit_code: i32) -> Result<()> {
        let runtime = (self.time - self.started).max(0.0) as i32;
        self.write(Kind::Exit(ExitRecord { exit_code, runtime }))
    }

    fn write(&mut self, kind: Kind) -> Result<()> {
        self.number += 1;
        let record = Record { num: self.number, kind: Some(kind) };
        let begin = self.file.len();
        let header = if begin == 0 { &HEADER[..] } else { &[] };
        let at = begin + header.len() as u64;
        self.file.append(&[header, &frame(&record.encode_to_vec(), at as usize)].concat())
    }
}

/// The file's first bytes: ident, magic and version.
const HEADER: [u8; 7] = *b":W&B\xe1\xbe\x00";
const BLOCK: usize = 32 * 1024;
/// Bytes before a fragment's data.
const FRAGMENT: usize = 7;
/// A fragment's kinds: a whole record, and the parts of one that stands in several.
const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;

/// A record as it stands `at` this place in the file.
fn frame(mut data: &[u8], mut at: usize) -> Vec<u8> {
    let mut framed = Vec::with_capacity(data.len() + 2 * FRAGMENT);
    let mut first = true;
    loop {
        let left = BLOCK - at % BLOCK;
        if left < FRAGMENT {
            framed.extend(std::iter::repeat_n(0, left));
            at += left;
            continue;
        }
        let (piece, rest) = data.split_at(data.len().min(left - FRAGMENT));
        let kind = match (first, rest.is_empty()) {
            (true, true) => FULL,
            (true, false) => FIRST,
            (false, false) => MIDDLE,
            (false, true) => LAST,
        };
        framed.extend(crc(kind, piece));
        framed.extend((piece.len() as u16).to_le_bytes()); // below the block's 2^15
        framed.push(kind);
        framed.extend(piece);
        at += FRAGMENT + piece.len();
        (data, first) = (rest, false);
        if data.is_empty() {
            return framed;
        }
    }
}

/// The whole records of a file, each with where it ends. What is broken ends them.
fn records(bytes: &[u8]) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let mut at = if bytes.starts_with(&HEADER) { HEADER.len() } else { bytes.len() };
    std::iter::from_fn(move || {
        let (mut data, mut begun) = (Vec::new(), false);
        loop {
            let left = BLOCK - at % BLOCK;
            if left < FRAGMENT {
                at += left;
                continue;
            }
            let (head, rest) = bytes.get(at..)?.split_first_chunk::<FRAGMENT>()?;
            let [c0, c1, c2, c3, l0, l1, kind] = *head;
            let piece = rest.get(..u16::from_le_bytes([l0, l1]).into())?;
            if [c0, c1, c2, c3] != crc(kind, piece) || matches!(kind, FULL | FIRST) == begun {
                return None;
            }
            begun = true;
            data.extend(piece);
            at += FRAGMENT + piece.len();
            if matches!(kind, FULL | LAST) {
                return Some((at as u64, data));
            }
        }
    })
}

/// Of a fragment's kind and data.
fn crc(kind: u8, data: &[u8]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind]);
    hasher.update(data);
    hasher.finalize().to_le_bytes()
}

/// `20261124_021530`, UTC, as offline runs carry it in their names.
fn date_time(seconds: u64) -> String {
    let (mut days, second) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 0;
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year}{:02}{:02}_{hour:02}{minute:02}{:02}", month + 1, days + 1, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_any_length_stand_across_blocks() {
        // After the first one the block has room for a fragment without data.
        let lengths = [BLOCK - 3 * FRAGMENT, 9, 32_740, 5, 0, 100_000, BLOCK - 2 * FRAGMENT, 3, 65_536];
        let data: Vec<Vec<u8>> = lengths.iter().map(|&length| (0..length).map(|i| (i % 251) as u8).collect()).collect();
        let (mut file, mut ends) = (HEADER.to_vec(), Vec::new());
        for record in &data {
            let framed = frame(record, file.len());
            file.extend(framed);
            ends.push(file.len() as u64);
        }
        let read: Vec<_> = records(&file).collect();
        assert_eq!(read.iter().map(|(end, _)| *end).collect::<Vec<_>>(), ends);
        assert!(read.into_iter().map(|(_, record)| record).eq(data));

        let whole = |bytes: &[u8]| records(bytes).count();
        assert_eq!(whole(&file[..file.len() - 1]), lengths.len() - 1, "a cut record is none");
        file[HEADER.len()] ^= 1;
        assert_eq!(whole(&file), 0, "a broken one ends the file");
        assert_eq!(whole(b""), 0);
    }

    #[test]
    fn a_date_is_the_calendars() {
        // By `date -u -d @N +%Y%m%d_%H%M%S`.
        for (seconds, expected) in
            [(0, "19700101_000000"), (951_827_696, "20000229_123456"), (1_795_485_217, "20261124_015337")]
        {
            assert_eq!(date_time(seconds), expected);
        }
    }
}
