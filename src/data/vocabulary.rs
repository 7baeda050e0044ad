//! Tokenizers for models from scratch, trained on texts: one kind a file. The bytes of each depend on the
//! texts alone.

mod byte_level_bpe;
mod unigram;
mod wordpiece;

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use kiln_models::TokenizerKind;
use rayon::prelude::*;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, NormalizedString, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::Tokenizer;
use crate::user_error;

/// Trains a tokenizer on `texts`. Its vocabulary holds `vocab_size` tokens, or fewer where the texts
/// have no more to merge.
///
/// # Errors
/// The user's, where `vocab_size` does not hold the alphabet.
pub fn train(kind: TokenizerKind, texts: &[&str], vocab_size: usize) -> Result<Tokenizer> {
    match kind {
        TokenizerKind::WordPiece => wordpiece::train(texts, vocab_size),
        TokenizerKind::ByteLevelBpe => byte_level_bpe::train(texts, vocab_size),
        TokenizerKind::Unigram => unigram::train(texts, vocab_size),
    }
}

/// Characters beyond the most frequent so many are unknown, as in BERT's own vocabularies.
const ALPHABET: usize = 1000;

/// The special tokens of RoBERTa and its kin, by id, and what transformers calls them.
const ROBERTA: [&str; 5] = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"];
const ROBERTA_NAMES: [(&str, &str); 7] = [
    ("bos_token", "<s>"),
    ("eos_token", "</s>"),
    ("sep_token", "</s>"),
    ("cls_token", "<s>"),
    ("unk_token", "<unk>"),
    ("pad_token", "<pad>"),
    ("mask_token", "<mask>"),
];

fn special(tokens: &[&str]) -> Vec<AddedToken> {
    tokens.iter().map(|&token| AddedToken::from(token, true)).collect()
}

/// The words that a tokenizer will see of each text, by how often they come.
fn count_words(
    texts: &[&str],
    normalize: impl Fn(&str) -> Result<NormalizedString> + Sync,
    split: &(impl PreTokenizer + Sync),
) -> Result<BTreeMap<String, u32>> {
    let words = |text: &&str| -> Result<Vec<String>> {
        let mut words = PreTokenizedString::from(normalize(text)?);
        split.pre_tokenize(&mut words).map_err(|e| anyhow!("cannot split a text into words: {e}"))?;
        let splits = words.get_splits(OffsetReferential::Original, OffsetType::None);
        Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).filter(|word| !word.is_empty()).collect())
    };
    let all: Vec<Vec<String>> = texts.par_iter().map(words).collect::<Result<_>>()?;
    let mut counts = BTreeMap::<String, u32>::new();
    for word in all.into_iter().flatten() {
        *counts.entry(word).or_default() += 1;
    }
    Ok(counts)
}

/// The most frequent characters of words, in order.
fn alphabet(words: &BTreeMap<String, u32>) -> Vec<char> {
    let mut counts = BTreeMap::<char, u64>::new();
    for (word, &count) in words {
        for c in word.chars() {
            *counts.entry(c).or_default() += u64::from(count);
        }
    }
    let mut alphabet: Vec<(char, u64)> = counts.into_iter().collect();
    alphabet.sort_by_key(|&(c, count)| (std::cmp::Reverse(count), c));
    alphabet.truncate(ALPHABET);
    let mut alphabet: Vec<char> = alphabet.into_iter().map(|(c, _)| c).collect();
    alphabet.sort_unstable();
    alphabet
}

fn check_size(vocab_size: usize, needed: usize) -> Result<()> {
    if vocab_size < needed {
        return Err(user_error!(
            "tokenizer.vocab_size = {vocab_size} does not hold the alphabet of the train part: needs {needed}, and more for words"
        ));
    }
    Ok(())
}

fn failed(error: tokenizers::Error) -> anyhow::Error {
    anyhow!("cannot train a tokenizer: {error}")
}

/// The tokenizer with its files; `settings` are the class's own in tokenizer_config.json.
fn finish(
    mut tokenizer: tokenizers::Tokenizer,
    tokens: &[&str],
    names: &[(&str, &str)],
    settings: &[(&str, Value)],
) -> Result<Tokenizer> {
    tokenizer.add_special_tokens(special(tokens)).map_err(failed)?;
    let json = tokenizer.to_string(true).map_err(failed)?.into_bytes();
    let names: Map<String, Value> = names.iter().map(|&(name, token)| (name.to_owned(), token.into())).collect();
    let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), value.clone()));
    let config: Map<String, Value> = names.clone().into_iter().chain(settings).collect();
    Tokenizer::trained(json, &config, &names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{encode_texts, sample};

    const KINDS: [TokenizerKind; 3] = [TokenizerKind::WordPiece, TokenizerKind::ByteLevelBpe, TokenizerKind::Unigram];

    #[test]
    fn training_gives_the_same_bytes_every_time() {
        let rows = sample::documents(1, 300);
        let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
        let mut reversed = texts.clone();
        reversed.reverse();
        // The sample has no more pieces that a Unigram model would keep.
        for (kind, (tokens, pad, added)) in KINDS.into_iter().zip([(1500, 0, 3), (1500, 1, 4), (1370, 1, 4)]) {
            let first = train(kind, &texts, 1500).unwrap();
            for texts in [&texts, &reversed, &texts, &texts, &texts, &texts] {
                assert_eq!(train(kind, texts, 1500).unwrap().hash(), first.hash(), "{kind:?}");
            }
            assert_eq!(first.vocab_size(), tokens, "{kind:?}");
            assert_eq!((first.pad_id(), first.added_tokens(false), first.added_tokens(true)), (pad, 2, added));
        }
    }

    #[test]
    fn a_vocabulary_below_the_alphabet_is_an_error() {
        for (kind, needed) in KINDS.into_iter().zip([11, 261, 10]) {
            let error = train(kind, &["abc"], 9).err().unwrap().to_string();
            let wanted = format!("vocab_size = 9 does not hold the alphabet of the train part: needs {needed}");
            assert!(error.contains(&wanted), "{error}");
        }
        // What is just enough is enough; of a word that came once there is nothing to merge or to keep.
        for (kind, (enough, tokens)) in KINDS.into_iter().zip([(11, 11), (261, 261), (10, 9)]) {
            assert_eq!(train(kind, &["abc"], enough).unwrap().vocab_size(), tokens, "{kind:?}");
        }
    }

    #[test]
    fn characters_beyond_the_alphabet_are_unknown() {
        // Each of 1500 characters stands in one word with "ab".
        let text: String = (0..1500).map(|i| format!("ab{}ab ", char::from_u32(0x4e00 + i).unwrap())).collect();
        for (kind, unknown) in [(TokenizerKind::WordPiece, 1), (TokenizerKind::Unigram, 3)] {
            let tokenizer = train(kind, &[&text], 2100).unwrap();
            let ids = encode_texts(&tokenizer, &[("abab", None), (&format!("{}", '\u{53db}'), None)], 64, 1).unwrap();
            assert!(!ids[0].input_ids.contains(&unknown), "{kind:?}: {ids:?}");
            assert!(ids[1].input_ids.contains(&unknown), "{kind:?}: {ids:?}");
        }
    }

    #[test]
    fn what_a_text_calls_as_a_special_token_is_no_piece() {
        // Two letters, "</s>", two letters, and both again as words: without care "</s>" is a piece too.
        let letters = |i: u32, shift: u32| {
            let x = i.wrapping_mul(2_654_435_761);
            [shift, shift + 5].map(|shift| char::from(b'a' + (x >> shift) as u8 % 26)).iter().collect::<String>()
        };
        let pair = |i| (letters(i, 8), letters(i, 18));
        let texts: Vec<String> = (0..2000).map(pair).map(|(a, b)| format!("{a}</s>{b} {a} {b}")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        for (kind, vocab_size) in KINDS.into_iter().zip([100, 300, 100]) {
            let tokenizer = train(kind, &texts, vocab_size).unwrap();
            let json: Value = serde_json::from_slice(&json(&tokenizer)).unwrap();
            let ids: Vec<u64> =
                json["added_tokens"].as_array().unwrap().iter().map(|t| t["id"].as_u64().unwrap()).collect();
            assert_eq!(ids, [0, 1, 2, 3, 4], "{kind:?}");
        }
    }

    fn json(tokenizer: &Tokenizer) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        std::fs::read(folder.path().join("tokenizer.json")).unwrap()
    }

    #[test]
    fn texts_without_a_word_make_a_tokenizer_of_special_tokens() {
        for (kind, tokens) in KINDS.into_iter().zip([5, 261, 5]) {
            assert_eq!(train(kind, &[" \n", ""], 300).unwrap().vocab_size(), tokens, "{kind:?}");
        }
    }

    #[test]
    fn special_tokens_stand_as_their_models_read_them() {
        let rows = sample::documents(1, 100);
        let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
        for (kind, ends, between) in [
            (TokenizerKind::WordPiece, [2, 3], vec![3]),
            (TokenizerKind::ByteLevelBpe, [0, 2], vec![2, 2]),
            (TokenizerKind::Unigram, [0, 2], vec![2, 2]),
        ] {
            let tokenizer = train(kind, &texts, 800).unwrap();
            let ids = |rows: &[(&str, Option<&str>)]| {
                encode_texts(&tokenizer, rows, 64, 1).unwrap().into_iter().map(|row| row.input_ids).collect::<Vec<_>>()
            };
            let rows = ids(&[("audit report", None), ("a contract", None)]);
            let [a, b] = [&rows[0], &rows[1]].map(|row| &row[1..row.len() - 1]);
            assert!(rows.iter().all(|row| [row[0], row[row.len() - 1]] == ends), "{kind:?}: {rows:?}");
            assert_eq!(
                ids(&[("audit report", Some("a contract"))])[0],
                [&ends[..1], a, &between, b, &ends[1..]].concat()
            );
        }
    }
}
