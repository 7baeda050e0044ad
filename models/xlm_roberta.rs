//! XLM-RoBERTa for sequence classification (Conneau et al., 2019), with the semantics of transformers'
//! `XLMRobertaForSequenceClassification`: [RoBERTa](crate::roberta) with another vocabulary.

use crate::{Architecture, TokenizerKind, roberta};

/// XLM-RoBERTa's line in the registry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "xlm-roberta",
    class_name: "XLMRobertaForSequenceClassification",
    tokenizer: TokenizerKind::Unigram,
    tokenizer_class: "XLMRobertaTokenizer",
    ..roberta::ARCHITECTURE
};
