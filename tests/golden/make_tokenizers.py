"""Small tokenizers of each kind trained on BBC News, and the ids they give, as the reference for kiln's encoding.

usage: make_tokenizers.py [OUTPUT]      OUTPUT is by default the folder tokenizers/ beside this file
Reads experiments/data/bbc: experiments/fetch.sh bbc brings it.

Trainers number some pieces in the order of a hash map with a random seed, so each run gives another, equally good
vocabulary: the two files of a kind belong together.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

SENTENCES = [
    "Hello, world! It's £5bn — naïve café.",
    "",
    "  double  spaces\tand\nnewlines ",
    "unaffable 1234.56 CO2 日本 😀",
    "A" * 150,
]

here = Path(__file__).parent
output = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "tokenizers"
documents = sorted((here / "../../experiments/data/bbc").glob("*/*.txt"))[:600]
if not documents:
    raise SystemExit("experiments/data/bbc is not there: run experiments/fetch.sh bbc")

texts = [path.read_text(encoding="utf-8") for path in documents]
output.mkdir(parents=True, exist_ok=True)


def make(name, tokenizer, trainer, single, pair):
    tokenizer.train_from_iterator(texts, trainer)
    ends = [token for token in ("[CLS]", "[SEP]", "<s>", "</s>") if token in single.split()]
    special_tokens = [(token, tokenizer.token_to_id(token)) for token in ends]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special_tokens)
    tokenizer.save(str(output / f"{name}.json"))
    encodings = [(text, tokenizer.encode(text)) for text in SENTENCES]
    expected = [{"text": text, "ids": encoding.ids, "offsets": encoding.offsets} for text, encoding in encodings]
    (output / f"{name}.expected.json").write_text(json.dumps(expected, ensure_ascii=False), encoding="utf-8")
    print(f"{name}: {tokenizer.get_vocab_size()} entries, {[len(row['ids']) for row in expected]} ids")


wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
wordpiece.normalizer = normalizers.BertNormalizer()
wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
wordpiece.decoder = decoders.WordPiece()
trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=BERT, show_progress=False)
make("wordpiece", wordpiece, trainer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")

bytebpe = Tokenizer(models.BPE())
bytebpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytebpe.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=ROBERTA, initial_alphabet=alphabet, show_progress=False)
make("bytebpe", bytebpe, trainer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")

unigram = Tokenizer(models.Unigram())
unigram.normalizer = normalizers.Sequence([normalizers.NFKC()])
unigram.pre_tokenizer = pre_tokenizers.Metaspace()
unigram.decoder = decoders.Metaspace()
trainer = trainers.UnigramTrainer(vocab_size=2000, special_tokens=ROBERTA, unk_token="<unk>", show_progress=False)
make("unigram", unigram, trainer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
