"""A small WordPiece tokenizer trained on BBC News, and the ids it gives, as the reference for kiln's encoding.

usage: make_tokenizers.py [OUTPUT]      OUTPUT is by default the folder tokenizers/ beside this file
Reads experiments/data/bbc: experiments/fetch.sh bbc brings it.

The trainer numbers the ##-letters in the order of a hash map with a random seed, so each run gives another, equally
good vocabulary: the two files belong together.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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

tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
tokenizer.normalizer = normalizers.BertNormalizer()
tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
tokenizer.decoder = decoders.WordPiece()
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
tokenizer.train_from_iterator(
    [path.read_text(encoding="utf-8") for path in documents],
    trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special, show_progress=False),
)
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B [SEP]",
    special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
)

output.mkdir(parents=True, exist_ok=True)
tokenizer.save(str(output / "wordpiece.json"))
encodings = [(text, tokenizer.encode(text)) for text in SENTENCES]
expected = [{"text": text, "ids": encoding.ids, "offsets": encoding.offsets} for text, encoding in encodings]
(output / "wordpiece.expected.json").write_text(json.dumps(expected, ensure_ascii=False), encoding="utf-8")
print(f"wordpiece: {tokenizer.get_vocab_size()} entries, {[len(row['ids']) for row in expected]} ids")
