//! RoBERTa's kind: pairs of bytes, merged by how often they meet (Radford et al., 2019). No text has an
//! unknown token.

use anyhow::Result;
use tokenizers::Trainer;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::roberta::RobertaProcessing;

use super::{ROBERTA, ROBERTA_NAMES, Tokenizer, check_size, count_words, failed, finish, special};

pub fn train(texts: &[&str], vocab_size: usize) -> Result<Tokenizer> {
    let bytes = ByteLevel::new(false, true, true); // no space before the first word; words are GPT-2's
    let alphabet = ByteLevel::alphabet();
    check_size(vocab_size, ROBERTA.len() + alphabet.len())?;

    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(special(&ROBERTA))
        .initial_alphabet(alphabet.into_iter().collect())
        .show_progress(false)
        .build();
    let words = count_words(texts, |text| Ok(text.into()), &bytes)?;
    let as_often = |word: &str| Ok(vec![word.to_owned(); words[word] as usize]);
    trainer.feed(words.keys(), as_often).map_err(failed)?;
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(failed)?;

    // <s> a </s>, and a pair <s> a </s></s> b </s>
    let ends = RobertaProcessing::new(("</s>".into(), 2), ("<s>".into(), 0)).trim_offsets(true).add_prefix_space(false);
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(bytes));
    tokenizer.with_post_processor(Some(ends));
    tokenizer.with_decoder(Some(bytes));
    let settings = [("add_prefix_space", false.into()), ("trim_offsets", true.into()), ("errors", "replace".into())];
    finish(tokenizer, &ROBERTA, &ROBERTA_NAMES, &settings)
}
