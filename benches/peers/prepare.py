"""Makes what all contestants load, once, in ${KILN_CACHE:-~/.cache/kiln}/data/peers:

minilm bert-base                  full checkpoints of BertForSequenceClassification with 5 labels: all-MiniLM-L6-v2 with
                                  a new classifier, and BERT-base with random weights
minilm-dropout-0 bert-base-dropout-0    the same weights with no dropout, to compare losses
minilm-optimum/model.onnx         minilm by torch.onnx.export, as Optimum does it
bbc-repeated.csv                  BBC's train part eight times, each row made different by the number before it

Fetch and split first: experiments/fetch.sh all-MiniLM-L6-v2 bbc, bbc_split.py. run.sh does all of it.
"""

import csv
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from contestant import LABELS, data, peers

COPIES = 8
OPSET = 17
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def checkpoint(model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(data / "all-MiniLM-L6-v2").save_pretrained(folder)
    without = folder.with_name(f"{folder.name}-dropout-0")
    shutil.copytree(folder, without, copy_function=os.link)
    config = json.loads((folder / "config.json").read_text()) | NO_DROPOUT
    (without / "config.json").unlink()
    (without / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def export(folder, target):
    """The graph that Optimum makes: the TorchScript exporter, SDPA taken apart, symbolic batch and sequence."""
    target.mkdir()
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {0: "batch_size", 1: "sequence_length"}
    ids = torch.ones(2, 16, dtype=torch.int64)
    ids[1, 9:] = 0  # some padding, so that the mask is not left out
    warnings.simplefilter("ignore")  # of tracing; that the graph says the same is seen by its loss
    torch.onnx.export(
        model, (), target / "model.onnx", kwargs={"input_ids": ids, "attention_mask": ids, "token_type_ids": ids * 0},
        input_names=names, output_names=["logits"], opset_version=OPSET, dynamo=False,
        dynamic_axes={name: axes for name in names} | {"logits": {0: "batch_size"}},
    )  # fmt: skip


def repeat(source, target):
    with open(source, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows((f"{copy} {text}", label) for copy in range(COPIES) for text, label in rows[1:])


def make(folder):
    torch.manual_seed(42)  # the classifier's weights, and all of BERT-base's
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    minilm = BertForSequenceClassification.from_pretrained(data / "all-MiniLM-L6-v2", **labels)
    checkpoint(minilm, folder / "minilm")
    checkpoint(BertForSequenceClassification(BertConfig(**labels)), folder / "bert-base")
    export(folder / "minilm", folder / "minilm-optimum")
    repeat(data / "bbc-split/train.csv", folder / "bbc-repeated.csv")


want = hashlib.sha256()
for part in (Path(__file__).read_bytes(), (data / "bbc-split/train.csv").read_bytes(),
             f"{torch.__version__} {transformers.__version__}".encode()):  # fmt: skip
    want.update(part)
stamp = peers / "stamp"
if stamp.is_file() and stamp.read_text() == want.hexdigest():
    sys.exit()
print(f"prepare: making {peers}", file=sys.stderr)
staged = Path(tempfile.mkdtemp(dir=data, prefix=".peers."))
try:
    make(staged)
    (staged / "stamp").write_text(want.hexdigest())
    shutil.rmtree(peers, ignore_errors=True)
    staged.rename(peers)
finally:
    shutil.rmtree(staged, ignore_errors=True)
