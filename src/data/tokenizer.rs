//! A Hugging Face tokenizer: its files as they are, and the encoder they describe.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use rayon::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Trainer,
};

use super::short_hash;
use crate::user_error;

/// A tokenizer and the files it is kept in.
#[derive(Clone)]
pub struct Tokenizer {
    /// Without truncation and padding, which kiln does by itself.
    pub(super) inner: tokenizers::Tokenizer,
    json: Vec<u8>,
    /// tokenizer_config.json and special_tokens_map.json, where there are any.
    beside: BTreeMap<&'static str, Vec<u8>>,
    hash: String,
    pad_id: u32,
}

const BESIDE: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

impl Tokenizer {
    /// Reads tokenizer.json, and tokenizer_config.json and special_tokens_map.json where they are.
    ///
    /// # Errors
    /// The user's, where tokenizer.json is not there or none.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let json = fs::read(&path).map_err(|e| {
            user_error!(
                "cannot read {}: {e}; a folder that has a vocabulary alone gets one from transformers: \
                 AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
                path.display()
            )
        })?;
        let mut beside = BTreeMap::new();
        for name in BESIDE {
            match fs::read(folder.join(name)) {
                Ok(bytes) => _ = beside.insert(name, bytes),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).with_context(|| format!("cannot read {}", folder.join(name).display())),
            }
        }
        Self::new(json, beside).map_err(|e| user_error!("{}: {e:#}", path.display()))
    }

    fn new(json: Vec<u8>, beside: BTreeMap<&'static str, Vec<u8>>) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(&json).map_err(|e| anyhow!("no tokenizer: {e}"))?;
        let pad_id = pad_id(&inner, &beside);
        inner.with_truncation(None).map_err(|e| anyhow!("{e}"))?;
        inner.with_padding(None);
        let mut digest = Sha256::new();
        digest.update(&json);
        Ok(Self { inner, json, beside, hash: short_hash(digest), pad_id })
    }

    /// Writes the files where transformers' `AutoTokenizer` opens them.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let files = self.beside.iter().map(|(name, bytes)| (*name, bytes)).chain([("tokenizer.json", &self.json)]);
        for (name, bytes) in files {
            let path = folder.join(name);
            fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Names the tokenizer by its tokenizer.json.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The id that fills up a batch; 0 where the tokenizer names none, as what it is under a mask of
    /// 0 does not count.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// Rows that an embedding of its tokens needs: the highest id and one.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// Special tokens that are added to a text, or to a pair.
    pub fn added_tokens(&self, pair: bool) -> usize {
        use tokenizers::PostProcessor;
        self.inner.get_post_processor().map_or(0, |processor| processor.added_tokens(pair))
    }
}

fn pad_id(tokenizer: &tokenizers::Tokenizer, beside: &BTreeMap<&str, Vec<u8>>) -> u32 {
    if let Some(padding) = tokenizer.get_padding() {
        return padding.pad_id;
    }
    // A token is a string, or an object with its `content`.
    let named = BESIDE.iter().find_map(|name| {
        let config: Value = serde_json::from_slice(beside.get(name)?).ok()?;
        let token = &config["pad_token"];
        tokenizer.token_to_id(token.as_str().or_else(|| token["content"].as_str())?)
    });
    named.or_else(|| ["[PAD]", "<pad>"].iter().find_map(|token| tokenizer.token_to_id(token))).unwrap_or(0)
}

const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// Characters beyond the most frequent so many are unknown, as in BERT's own vocabularies.
const ALPHABET: usize = 1000;

/// Trains a lower-casing WordPiece tokenizer, BERT's form, on `texts`. Its vocabulary holds
/// `vocab_size` tokens, or fewer where the texts have no more to merge.
///
/// The bytes depend on the texts alone. The trainer of `tokenizers` numbers the alphabet's `##`
/// pieces in the order of a randomly seeded hash map, and breaks ties between merges by number; so
/// the alphabet is given to it in order, as if it were special tokens, which come first.
///
/// # Errors
/// The user's, where `vocab_size` does not hold the alphabet.
pub fn train_wordpiece(texts: &[&str], vocab_size: usize) -> Result<Tokenizer> {
    let words: Vec<Vec<String>> = texts.par_iter().map(|text| words(text)).collect::<Result<_>>()?;

    let mut counts = BTreeMap::<char, u64>::new();
    for c in words.iter().flatten().flat_map(|word| word.chars()) {
        *counts.entry(c).or_default() += 1;
    }
    let mut alphabet: Vec<(char, u64)> = counts.into_iter().collect();
    alphabet.sort_by_key(|&(c, count)| (std::cmp::Reverse(count), c));
    alphabet.truncate(ALPHABET);
    alphabet.sort_unstable();
    let known = |word: &str| word.chars().all(|c| alphabet.binary_search_by_key(&c, |&(c, _)| c).is_ok());
    let pieces = alphabet.iter().flat_map(|(c, _)| [c.to_string(), format!("##{c}")]);
    let first: Vec<AddedToken> = SPECIAL
        .iter()
        .map(|token| (*token).to_owned())
        .chain(pieces)
        .map(|token| AddedToken::from(token, true))
        .collect();
    if vocab_size < first.len() {
        return Err(user_error!(
            "tokenizer.vocab_size = {vocab_size} does not hold the alphabet of the train part: needs {}, and more for words",
            first.len()
        ));
    }

    let mut trainer = WordPieceTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(first)
        .show_progress(false)
        .build();
    let failed = |e| anyhow!("cannot train a tokenizer: {e}");
    let texts =
        words.iter().map(|words| words.iter().filter(|word| known(word)).cloned().collect::<Vec<_>>().join(" "));
    trainer
        .feed(texts, |text| Ok(text.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect()))
        .map_err(failed)?;
    let mut model = WordPiece::default();
    trainer.train(&mut model).map_err(failed)?;

    let id = |token: &str| SPECIAL.iter().position(|special| *special == token).unwrap_or(0) as u32;
    let template = TemplateProcessing::builder()
        .try_single("[CLS]:0 $A:0 [SEP]:0")
        .and_then(|builder| builder.try_pair("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"))
        .map_err(|e| anyhow!("{e}"))?
        .special_tokens(vec![("[CLS]", id("[CLS]")), ("[SEP]", id("[SEP]"))])
        .build()?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_normalizer(Some(normalizer())).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_post_processor(Some(template));
    tokenizer.with_decoder(Some(tokenizers::decoders::wordpiece::WordPiece::default()));
    tokenizer.add_special_tokens(SPECIAL.map(|token| AddedToken::from(token, true))).map_err(failed)?;
    let json = tokenizer.to_string(true).map_err(failed)?.into_bytes();

    let tokens = json!({
        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
    });
    let mut config = tokens.clone();
    config["tokenizer_class"] = "BertTokenizer".into();
    config["do_lower_case"] = true.into();
    config["tokenize_chinese_chars"] = true.into();
    config["strip_accents"] = Value::Null;
    config["clean_up_tokenization_spaces"] = true.into();
    let bytes = |value: &Value| serde_json::to_vec_pretty(value);
    Tokenizer::new(json, BTreeMap::from([(BESIDE[0], bytes(&config)?), (BESIDE[1], bytes(&tokens)?)]))
}

/// BERT's uncased normalizer.
fn normalizer() -> BertNormalizer {
    BertNormalizer::new(true, true, None, true)
}

/// The words of a text, as the tokenizer will see them.
fn words(text: &str) -> Result<Vec<String>> {
    let failed = |e| anyhow!("cannot split a text into words: {e}");
    let mut normalized = NormalizedString::from(text);
    normalizer().normalize(&mut normalized).map_err(failed)?;
    let mut split = PreTokenizedString::from(normalized);
    BertPreTokenizer.pre_tokenize(&mut split).map_err(failed)?;
    let splits = split.get_splits(OffsetReferential::Original, OffsetType::None);
    Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::sample;

    #[test]
    fn training_gives_the_same_bytes_every_time() {
        let rows = sample::documents(1, 300);
        let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
        let first = train_wordpiece(&texts, 1500).unwrap();
        let mut reversed = texts.clone();
        reversed.reverse();
        for texts in [&texts, &reversed, &texts, &texts, &texts, &texts] {
            assert!(train_wordpiece(texts, 1500).unwrap().json == first.json);
        }
        assert_eq!(first.vocab_size(), 1500);
        assert_eq!((first.pad_id(), first.added_tokens(false), first.added_tokens(true)), (0, 2, 3));
    }

    #[test]
    fn a_vocabulary_below_the_alphabet_is_an_error() {
        let error = train_wordpiece(&["abc"], 10).err().unwrap().to_string();
        assert!(error.contains("vocab_size = 10 does not hold the alphabet of the train part: needs 11"), "{error}");
    }

    #[test]
    fn a_folder_keeps_its_files() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let trained = train_wordpiece(&["a few words, a few more"], 60).unwrap();
        trained.save(from.path()).unwrap();
        let read = Tokenizer::from_folder(from.path()).unwrap();
        assert_eq!(read.hash(), trained.hash());
        read.save(to.path()).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
            assert_eq!(fs::read(from.path().join(name)).unwrap(), fs::read(to.path().join(name)).unwrap(), "{name}");
        }
        fs::write(from.path().join("tokenizer.json"), "{}").unwrap();
        assert!(
            Tokenizer::from_folder(from.path()).err().unwrap().to_string().contains("tokenizer.json: no tokenizer")
        );
    }
}
