//! BERT's kind: lower-case words, cut into pieces that continue with `##` (Wu et al., 2016).

use anyhow::{Result, anyhow};
use serde_json::Value;
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{NormalizedString, Normalizer, Trainer};

use super::{Tokenizer, alphabet, check_size, count_words, failed, finish, special};

const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
const NAMES: [(&str, &str); 5] = [
    ("unk_token", "[UNK]"),
    ("sep_token", "[SEP]"),
    ("pad_token", "[PAD]"),
    ("cls_token", "[CLS]"),
    ("mask_token", "[MASK]"),
];

/// The trainer of `tokenizers` numbers the alphabet's `##` pieces in the order of a randomly seeded hash
/// map, and breaks ties between merges by number; so the alphabet is given to it in order, as if it were
/// special tokens, which come first.
pub fn train(texts: &[&str], vocab_size: usize) -> Result<Tokenizer> {
    let normalize = |text: &str| {
        let mut text = NormalizedString::from(text);
        normalizer().normalize(&mut text).map_err(|e| anyhow!("cannot normalize a text: {e}"))?;
        Ok(text)
    };
    let mut words = count_words(texts, normalize, &BertPreTokenizer)?;
    let alphabet = alphabet(&words);
    words.retain(|word, _| word.chars().all(|c| alphabet.binary_search(&c).is_ok())); // others are [UNK] as a whole
    let pieces: Vec<String> = alphabet.iter().flat_map(|c| [c.to_string(), format!("##{c}")]).collect();
    let first = [&SPECIAL[..], &pieces.iter().map(String::as_str).collect::<Vec<_>>()].concat();
    check_size(vocab_size, first.len())?;

    let mut trainer = WordPieceTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(special(&first))
        .show_progress(false)
        .build();
    let as_often = |word: &str| Ok(vec![word.to_owned(); words[word] as usize]);
    trainer.feed(words.keys(), as_often).map_err(failed)?;
    let mut model = WordPiece::default();
    trainer.train(&mut model).map_err(failed)?;

    let template = TemplateProcessing::builder()
        .try_single("[CLS]:0 $A:0 [SEP]:0")
        .and_then(|builder| builder.try_pair("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"))
        .map_err(|e| anyhow!("{e}"))?
        .special_tokens(vec![("[CLS]", 2), ("[SEP]", 3)])
        .build()?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_normalizer(Some(normalizer())).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_post_processor(Some(template));
    tokenizer.with_decoder(Some(tokenizers::decoders::wordpiece::WordPiece::default()));
    let settings = [
        ("do_lower_case", true.into()),
        ("tokenize_chinese_chars", true.into()),
        ("strip_accents", Value::Null),
        ("clean_up_tokenization_spaces", true.into()),
    ];
    finish(tokenizer, &SPECIAL, &NAMES, &settings)
}

/// BERT's uncased normalizer.
fn normalizer() -> BertNormalizer {
    BertNormalizer::new(true, true, None, true)
}
