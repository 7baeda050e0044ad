//! XLM-RoBERTa's kind: of all ways to cut a word into pieces the likeliest (Kudo, 2018), with `▁` for the
//! space before a word.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::template::TemplateProcessing;

use super::{ROBERTA, ROBERTA_NAMES, Tokenizer, alphabet, check_size, count_words, failed, finish, special};

const UNKNOWN: usize = 3; // <unk>

/// What the trainer of `tokenizers` adds to the lowest score for each character without one.
const STEP: f64 = 1e-4;

/// On one thread and words in order, since sums of floats depend on it.
pub fn train(texts: &[&str], vocab_size: usize) -> Result<Tokenizer> {
    let space = Metaspace::new('▁', PrependScheme::Always, true);
    let split: [PreTokenizerWrapper; 2] = [WhitespaceSplit.into(), space.clone().into()];
    let split = Sequence::new(split.to_vec());
    let words = count_words(texts, |text| Ok(text.into()), &split)?;
    let alphabet = alphabet(&words);
    check_size(vocab_size, ROBERTA.len() + alphabet.len() + 1)?;

    let trainer = UnigramTrainer::builder()
        .vocab_size(u32::try_from(vocab_size)?)
        .special_tokens(special(&ROBERTA))
        .unk_token(Some(ROBERTA[UNKNOWN].to_owned()))
        .show_progress(false)
        .build()?;
    // Of a word, only the characters beyond the alphabet are unknown.
    let mut known = BTreeMap::<&str, u32>::new();
    for (word, count) in &words {
        let parts = word.split(|c| alphabet.binary_search(&c).is_err()).filter(|part| !part.is_empty());
        parts.for_each(|part| *known.entry(part).or_default() += count);
    }
    let known: Vec<(String, u32)> = known.into_iter().map(|(part, count)| (part.to_owned(), count)).collect();
    let mut model = Unigram::default();
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    if !known.is_empty() {
        alone.install(|| trainer.do_train(known, &mut model)).map_err(failed)?;
    }
    let model = in_order(&model, alphabet.len())?;

    let template = TemplateProcessing::builder()
        .try_single("<s> $A </s>")
        .and_then(|builder| builder.try_pair("<s> $A </s> </s> $B </s>"))
        .map_err(|e| anyhow!("{e}"))?
        .special_tokens(vec![("<s>", 0), ("</s>", 2)])
        .build()?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(split));
    tokenizer.with_post_processor(Some(template));
    tokenizer.with_decoder(Some(space));
    finish(tokenizer, &ROBERTA, &ROBERTA_NAMES, &[])
}

/// Special tokens, which no piece may be called, then pieces by score. Characters that no longer stand
/// alone in the likeliest cuts are given back by the trainer with the lowest score, and a step more for
/// each in the order of a randomly seeded hash set: here they all have the lowest.
fn in_order(model: &Unigram, alphabet: usize) -> Result<Unigram> {
    let mut pieces: Vec<_> = model.iter().filter(|(token, _)| !ROBERTA.contains(&&token[..])).cloned().collect();
    let lowest = pieces.iter().map(|(_, score)| *score).fold(f64::INFINITY, f64::min);
    for (token, score) in &mut pieces {
        if token.chars().count() == 1 && *score < lowest + STEP * (alphabet + 1) as f64 {
            *score = lowest;
        }
    }
    pieces.sort_by(|(a, x), (b, y)| y.total_cmp(x).then_with(|| a.cmp(b)));
    let special = ROBERTA.map(|token| (token.to_owned(), 0.0));
    Unigram::from([special.to_vec(), pieces].concat(), Some(UNKNOWN), false).map_err(failed)
}
