//! A Hugging Face tokenizer: its files as they are, and the encoder they describe.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use kiln_models::Architecture;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::short_hash;
use crate::error::guarded;
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

const CONFIG: &str = "tokenizer_config.json";
const TOKENS: &str = "special_tokens_map.json";
const BESIDE: [&str; 2] = [CONFIG, TOKENS];

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

    /// A tokenizer that was trained, with what stands in tokenizer_config.json and special_tokens_map.json.
    pub(super) fn trained(json: Vec<u8>, config: &Map<String, Value>, tokens: &Map<String, Value>) -> Result<Self> {
        let bytes = |table| serde_json::to_vec_pretty(table);
        Self::new(json, BTreeMap::from([(CONFIG, bytes(config)?), (TOKENS, bytes(tokens)?)]))
    }

    /// As transformers loads it for a model of `architecture` that reads `max_length` tokens.
    ///
    /// # Errors
    /// A tokenizer_config.json that is no table.
    pub fn of(mut self, architecture: &Architecture, max_length: usize) -> Result<Self> {
        let mut config: Map<String, Value> =
            self.beside.get(CONFIG).map(|bytes| serde_json::from_slice(bytes)).transpose()?.unwrap_or_default();
        config.insert("tokenizer_class".into(), architecture.tokenizer_class.into());
        config.insert("model_input_names".into(), json!(architecture.inputs));
        config.insert("model_max_length".into(), max_length.into());
        self.beside.insert(CONFIG, serde_json::to_vec_pretty(&config)?);
        Ok(self)
    }

    fn new(json: Vec<u8>, beside: BTreeMap<&'static str, Vec<u8>>) -> Result<Self> {
        let read = guarded(|| tokenizers::Tokenizer::from_bytes(&json));
        let read = read.ok_or_else(|| anyhow!("no tokenizer: it contradicts itself"))?;
        let mut inner = read.map_err(|e| anyhow!("no tokenizer: {e}"))?;
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

#[cfg(test)]
mod tests {
    use kiln_models::TokenizerKind;

    use super::*;
    use crate::data::vocabulary::train;

    #[test]
    fn a_folder_keeps_its_files() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let trained = train(TokenizerKind::WordPiece, &["a few words, a few more"], 60).unwrap();
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
