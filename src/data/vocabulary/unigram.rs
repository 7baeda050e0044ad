//! XLM-RoBERTa's kind: of all ways to cut a word into pieces the likeliest (Kudo, 2018), with `▁` for the
//! space before a word.

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
    let (alphabet, words) = alphabet(count_words(texts, |text| Ok(text.into()), &split)?);
    check_size(vocab_size, ROBERTA.len() + alphabet.len() + 1)?;

    let trainer = UnigramTrainer::builder()
        .vocab_size(u32::try_from(vocab_size)?)
        .special_tokens(special(&ROBERTA))
        .unk_token(Some(ROBERTA[UNKNOWN].to_owned()))
        .show_progress(false)
        .build()?;
    let mut model = Unigram::default();
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    alone.install(|| trainer.do_train(words.into_iter().collect(), &mut model)).map_err(failed)?;
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

/// The pieces by score, then in order. Characters that no longer stand alone in the likeliest cuts are
/// given back by the trainer with the lowest score, and a step more for each in the order of a randomly
/// seeded hash set: here they all have the lowest.
fn in_order(model: &Unigram, alphabet: usize) -> Result<Unigram> {
    let (special, mut pieces): (Vec<_>, Vec<_>) =
        model.iter().cloned().partition(|(token, _)| ROBERTA.contains(&&token[..]));
    let lowest = pieces.iter().map(|(_, score)| *score).fold(f64::INFINITY, f64::min);
    for (token, score) in &mut pieces {
        if token.chars().count() == 1 && *score < lowest + STEP * (alphabet + 1) as f64 {
            *score = lowest;
        }
    }
    pieces.sort_by(|(a, x), (b, y)| y.total_cmp(x).then_with(|| a.cmp(b)));
    Unigram::from([special, pieces].concat(), Some(UNKNOWN), false).map_err(failed)
}
