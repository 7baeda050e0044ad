//! Documents as a vendor-security team meets them, made from a seed: contracts, certificates, test
//! reports, questionnaires, on scanned and on clean pages.
//!
//! They are hard in the ways real ones are. All kinds share vocabulary and boilerplate, quote each
//! other, often come without a telling heading, vary from a sentence to a full page, and a few could
//! be either of two kinds. Integers alone decide everything, so every platform makes the same bytes.

mod templates;

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::rows::{self, Row, Word};
use crate::store;
use crate::user_error;
use templates::{BOILERPLATE, KINDS, SHARED, TITLES, choices};

/// The seed of the sample that `data.source = "sample"` names.
pub const SEED: u64 = 42;

/// Documents in that sample.
pub const COUNT: usize = 2400;

/// The sample of a seed: [`COUNT`] documents with labels and word boxes.
pub fn rows(seed: u64) -> Vec<Row> {
    documents(seed, COUNT)
}

/// Documents that [`write`] writes at most: all of them lie in memory.
const MOST: usize = 10_000_000;

/// The first `count` documents of a seed's endless sequence.
pub fn documents(seed: u64, count: usize) -> Vec<Row> {
    (0..count as u64).map(|i| document(seed, i)).collect()
}

/// SHA-256 of the sample, in place of a file's.
pub(super) fn content_hash(seed: u64) -> String {
    let mut digest = Sha256::new();
    for row in rows(seed) {
        digest.update(format!("{row:?}"));
    }
    super::hex(&digest.finalize())
}

/// Writes `count` documents to a .csv, .jsonl or .parquet file, or, where `path` has no extension,
/// to a new folder with a folder for each label. JSONL and Parquet hold words and boxes too.
///
/// # Errors
/// The user's for another extension, or a folder that is there already; files that cannot be written.
pub fn write(path: &Path, seed: u64, count: usize) -> Result<()> {
    if count > MOST {
        return Err(crate::user_error!("--count {count}: needs at most {MOST}"));
    }
    let rows = documents(seed, count);
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    match extension.as_deref() {
        None => write_folders(path, &rows),
        Some("csv") => store::write(path, |file| {
            let mut writer = csv::Writer::from_writer(file);
            writer.write_record(["id", "text", "label"])?;
            for row in &rows {
                writer.write_record([row.id.as_str(), &row.text, label(row)])?;
            }
            writer.flush()
        }),
        Some("jsonl") => store::write(path, |file| {
            for row in &rows {
                let words: Vec<&str> = row.words.iter().map(|word| word.text.as_str()).collect();
                let boxes: Vec<[i32; 4]> = row.words.iter().map(|word| word.bbox).collect();
                let line =
                    json!({ "id": row.id, "text": row.text, "label": row.label, "words": words, "boxes": boxes });
                writeln!(file, "{line}")?;
            }
            Ok(())
        }),
        Some("parquet") => store::write(path, |file| rows::write_parquet(file, rows.iter()).map_err(io::Error::other)),
        _ => Err(user_error!("the sample is written to .csv, .jsonl, .parquet or a folder, not to {}", path.display())),
    }
}

fn write_folders(path: &Path, rows: &[Row]) -> Result<()> {
    if path.exists() {
        return Err(user_error!("{} is there already; name a new folder", path.display()));
    }
    let staged = store::stage(path)?;
    for row in rows {
        let file = staged.path().join(label(row)).join(format!("{:0>5}.txt", row.id));
        fs::create_dir_all(staged.path().join(label(row)))
            .and_then(|()| fs::write(&file, &row.text))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    store::publish(staged, path)
}

fn label(row: &Row) -> &str {
    row.label.as_deref().unwrap_or_default()
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `0..n`.
    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// In `percent` of a hundred draws.
    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

fn document(seed: u64, i: u64) -> Row {
    let mut random = Random(seed);
    random = Random(random.next() ^ i.wrapping_mul(0xd1b5_4a32_d192_ed03));
    let total: u64 = KINDS.iter().map(|kind| kind.weight).sum();
    let mut drawn = random.below(total);
    let own = KINDS.iter().position(|kind| match drawn.checked_sub(kind.weight) {
        Some(rest) => {
            drawn = rest;
            false
        }
        None => true,
    });
    let own = own.unwrap_or(0);

    let mut blocks = compose(&mut random, own);
    if random.chance(20) {
        scan(&mut random, &mut blocks);
    }
    let words = place(&mut random, &blocks, KINDS[own].label);
    let text = words.iter().map(|word| word.text.as_str()).collect::<Vec<_>>().join(" ");
    Row { id: i.to_string(), text, text_pair: None, label: Some(KINDS[own].label.to_owned()), words }
}

/// Of a thousand documents those below could be of two kinds, those from there on below `HARD` say
/// little of their own.
const AMBIGUOUS: u64 = 55;
const HARD: u64 = 225;

/// The document's heading and paragraphs, as words.
fn compose(random: &mut Random, own: usize) -> Vec<Vec<String>> {
    let kind = &KINDS[own];
    // Words aimed at: many short ones, a few full pages.
    let length = match random.below(100) {
        0..25 => random.between(20, 36),
        25..72 => random.between(36, 70),
        72..93 => random.between(70, 120),
        93..99 => random.between(120, 240),
        _ => random.between(240, 390),
    } as usize;
    let other = if random.chance(75) { random.pick(kind.near) } else { random.below(KINDS.len() as u64) as usize };
    // Shares of own and quoted sentences, in percent; the rest any kind may hold.
    let (own_share, other_share, heading) = match random.below(1000) {
        0..AMBIGUOUS => (34, 33, 0),
        AMBIGUOUS..HARD => (38, 30, 30),
        _ => (58, 15, 60),
    };
    let ambiguous = heading == 0;

    let mut draw = |slot| random.pick(choices(slot));
    let facts = Facts { vendor: draw("vendor"), customer: draw("customer"), product: draw("product") };

    let mut blocks = Vec::new();
    if random.chance(heading) {
        let titles = if random.chance(70) { kind.titles } else { TITLES };
        let title = random.pick(titles);
        blocks.push(fill(random, &facts, title));
    }
    if random.chance(40) {
        let line = random.pick(BOILERPLATE);
        blocks.push(fill(random, &facts, line));
    }
    let mut said: Vec<&str> = Vec::new();
    let mut paragraph: Vec<String> = Vec::new();
    let mut words: usize = blocks.iter().map(Vec::len).sum();
    let (mut its_own, mut quoted) = (0, 0);
    while words < length {
        let share = random.below(100);
        // Something of its own is in every document, and unless it is to be ambiguous, quotes weigh less.
        let (sentences, said_so) = if its_own == 0 || share < own_share {
            (kind.sentences, Some(&mut its_own))
        } else if share < own_share + other_share && (ambiguous || quoted + 1 < its_own) {
            (KINDS[other].sentences, Some(&mut quoted))
        } else {
            (SHARED, None)
        };
        let sentence = random.pick(sentences);
        // A long page repeats itself in the end; a short one should not.
        if said.contains(&sentence) && random.chance(85) {
            continue;
        }
        said.push(sentence);
        if let Some(count) = said_so {
            *count += 1;
        }
        let sentence = fill(random, &facts, sentence);
        words += sentence.len();
        paragraph.extend(sentence);
        if random.chance(30) {
            blocks.push(std::mem::take(&mut paragraph));
        }
    }
    blocks.push(paragraph);
    if random.chance(20) {
        let line = random.pick(BOILERPLATE);
        blocks.push(fill(random, &facts, line));
    }
    blocks.retain(|block| !block.is_empty());
    blocks
}

/// What stays the same throughout a document.
struct Facts {
    vendor: &'static str,
    customer: &'static str,
    product: &'static str,
}

/// A template's words, its slots drawn.
fn fill(random: &mut Random, facts: &Facts, template: &str) -> Vec<String> {
    let mut text = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        let (slot, after) = after.split_once('}').unwrap_or((after, ""));
        text.push_str(before);
        match slot {
            "n" => text.push_str(&random.between(2, 98).to_string()),
            "digit" => text.push_str(&random.between(1, 9).to_string()),
            "year" => text.push_str(&random.between(2016, 2025).to_string()),
            "time" => text.push_str(&format!("{:02}:{:02}", random.below(24), random.below(60))),
            "date" => text.push_str(&date(random)),
            "id" => {
                let series = random.pick(&["VS", "DOC", "SEC", "REF", "A", "QM"]);
                text.push_str(&format!("{series}-{}-{:03}", random.between(2016, 2025), random.below(1000)));
            }
            "vendor" => text.push_str(facts.vendor),
            "customer" => text.push_str(facts.customer),
            "product" => text.push_str(facts.product),
            slot => text.push_str(random.pick(choices(slot))),
        }
        rest = after;
    }
    text.push_str(rest);
    let mut text: Vec<char> = text.chars().collect();
    text[0] = text[0].to_ascii_uppercase();
    text.into_iter().collect::<String>().split(' ').map(str::to_owned).collect()
}

fn date(random: &mut Random) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (day, month, year) = (random.between(1, 28), random.below(12) as usize, random.between(2018, 2025));
    match random.below(3) {
        0 => format!("{day} {} {year}", MONTHS[month]),
        1 => format!("{year}-{:02}-{day:02}", month + 1),
        _ => format!("{} {year}", MONTHS[month]),
    }
}

/// Misreads characters as optical character recognition does.
fn scan(random: &mut Random, blocks: &mut [Vec<String>]) {
    let percent = random.between(3, 12);
    for word in blocks.iter_mut().flatten() {
        if !random.chance(percent) {
            continue;
        }
        let confusions = [
            ("rn", "m"),
            ("l", "1"),
            ("o", "0"),
            ("e", "c"),
            ("i", "l"),
            ("m", "rn"),
            ("s", "5"),
            ("cl", "d"),
            ("t", "f"),
        ];
        match random.below(4) {
            0 if word.len() > 3 => _ = word.pop(),
            1 if word.len() > 3 => _ = word.remove(1),
            _ => {
                let (right, wrong) = random.pick(&confusions);
                *word = word.replacen(right, wrong, 1);
            }
        }
    }
}

/// Sets the blocks on a page of 1000 by 1000: headings large, certificates centred, a questionnaire's
/// paragraphs by turns left and right, as in a table; scanned a little askew.
fn place(random: &mut Random, blocks: &[Vec<String>], label: &str) -> Vec<Word> {
    let centred = label == "certificate" && random.chance(80);
    let table = label == "questionnaire" && random.chance(70);
    let skew = random.below(11) as i32 - 5; // rise over the page's width
    let mut top = random.between(40, 90) as i32;
    let mut words = Vec::new();
    for (i, block) in blocks.iter().enumerate() {
        let heading = i == 0 && block.len() < 12;
        let (character, height) = if heading { (12, 22) } else { (7, 12) };
        let (left, right) = match (table && !heading, i % 2) {
            (true, 0) => (70, 480),
            (true, _) => (520, 930),
            _ => (70, 930),
        };
        let width = |word: &str| character * word.chars().count() as i32;
        let mut line: Vec<&str> = Vec::new();
        let mut filled = 0;
        let mut set = |line: &mut Vec<&str>, filled: i32, top: i32| {
            let mut x = if centred || heading { (left + right - filled) / 2 } else { left };
            for word in line.drain(..) {
                let y = top + skew * x / 1000;
                let bbox = [x, y, x + width(word), y + height].map(|edge| edge.clamp(0, 1000));
                words.push(Word { text: word.to_owned(), bbox });
                x += width(word) + character;
            }
        };
        for word in block {
            if filled + width(word) > right - left && !line.is_empty() {
                set(&mut line, filled, top);
                top += height + 4;
                filled = 0;
            }
            filled += width(word) + character;
            line.push(word);
        }
        set(&mut line, filled, top);
        top += height + if heading { 24 } else { 12 };
    }
    words
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::{Data, Format, Source, Split};
    use crate::data::source;

    #[test]
    fn the_sample_is_the_same_everywhere() {
        // The sample is part of what users see: where this changes, the README's figures do too.
        assert_eq!(content_hash(SEED), "05fe9f2560e7b1501b149c977964544200fdc97acb1d67043b50290570f4146b");
        assert_ne!(content_hash(SEED), content_hash(SEED + 1));
        assert_eq!(documents(7, 20), documents(7, 50)[..20]);
    }

    #[test]
    fn documents_are_uneven_and_lie_on_their_pages() {
        let rows = rows(SEED);
        let mut labels = BTreeMap::<&str, usize>::new();
        for row in &rows {
            *labels.entry(label(row)).or_default() += 1;
            let words: Vec<&str> = row.words.iter().map(|word| word.text.as_str()).collect();
            assert_eq!(words.join(" "), row.text);
            assert!((20..=420).contains(&words.len()), "{} words", words.len());
            assert!(row.text.is_ascii() && !row.text.contains(['{', '}']), "{}", row.text);
            for Word { text, bbox: [left, top, right, bottom] } in &row.words {
                assert!(0 <= *left && left < right && *right <= 1000, "{text} of {}: {left}..{right}", row.id);
                assert!(0 <= *top && top < bottom && *bottom <= 1000, "{text} of {}: {top}..{bottom}", row.id);
            }
        }
        assert_eq!(labels.len(), KINDS.len());
        assert!(labels.values().max() >= labels.values().min().map(|least| 3 * least).as_ref(), "{labels:?}");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let data = |id: Option<&str>| Data {
            source: Source::Sample,
            format: Format::Auto,
            text: "text".into(),
            text_pair: None,
            label: "label".into(),
            id: id.map(str::to_owned),
            split: Split { validation: 0.1, test: 0.2, seed: 42 },
        };
        let texts = |rows: &[Row]| -> Vec<(String, String)> {
            let mut texts: Vec<_> = rows.iter().map(|row| (row.text.clone(), label(row).to_owned())).collect();
            texts.sort();
            texts
        };
        let wanted = texts(&documents(3, 40));
        for (name, id) in [("a.csv", Some("id")), ("a.jsonl", Some("id")), ("a.parquet", Some("id")), ("folder", None)]
        {
            let path = folder.path().join(name);
            write(&path, 3, 40).unwrap();
            assert_eq!(texts(&source::read(&path, &data(id), true).unwrap().rows), wanted, "{name}");
        }
        assert_eq!(rows::read_parquet(&folder.path().join("a.parquet")).unwrap(), documents(3, 40));
        assert!(write(&folder.path().join("folder"), 3, 40).unwrap_err().to_string().contains("there already"));
        assert!(write(&folder.path().join("a.xml"), 3, 40).unwrap_err().to_string().contains("not to"));
    }
}
