"""usage: load_model.py MODEL_DIR IDS_JSON …: model folders through transformers, as a user would load them.

IDS_JSON is a file that holds a list of sequences of token ids, or of objects of named inputs
(input_ids, token_type_ids, …); each goes through alone. Prints a line of JSON for each folder: logits (a list a sequence), id2label,
architecture, tokenizer (its class, vocab_size, max_length, the inputs that it gives, the ids of "Hello, world!" and of
"Hello, world!" with "What's up?" as a pair), missing and unexpected keys.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

arguments = sys.argv[1:]
for folder, path in zip(arguments[::2], arguments[1::2], strict=True):
    with open(path, encoding="utf-8") as file:
        sequences = [row if isinstance(row, dict) else {"input_ids": row} for row in json.load(file)]
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model.eval()
    with torch.inference_mode():
        logits = [model(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits[0].tolist() for row in sequences]

    print(json.dumps({
        "logits": logits,
        "id2label": {str(index): label for index, label in model.config.id2label.items()},
        "architecture": type(model).__name__,
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "max_length": tokenizer.model_max_length,
            "inputs": sorted(tokenizer("Hello, world!")),
            "hello": tokenizer("Hello, world!")["input_ids"],
            "pair": tokenizer("Hello, world!", "What's up?")["input_ids"],
        },
        "missing_keys": sorted(loading["missing_keys"]),
        "unexpected_keys": sorted(loading["unexpected_keys"]),
    }))  # fmt: skip
