"""transformers' BertForSequenceClassification under Accelerate, as its users run it: SDPA, fused AdamW, bf16.

peer.py WORKLOAD VARIANT answers each line on stdin with a line of JSON: `build` loads and warms up, `turn` trains. A
variant is eager or compiled (torch.compile by Accelerate), and computes in bf16 by autocast over fp32 weights or on
bf16 weights. What it and kiln read is made by the first `build`: random weights, and texts of words that are each one
token. Batches lie ready in pinned memory, padded to their longest row (to a multiple of 8), with a mask: what a loader
of a user's would do beside the training costs nothing here.
"""

import csv
import hashlib
import json
import random
import statistics
import sys
import time

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from transformers import BertConfig, BertForSequenceClassification

from compare import SHAPES, TINY, VARIANTS, WARMUP, WORKLOADS, data_folder, flops

SEED = 42
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP, VOCABULARY, LABELS = 2, 3, 30522, 3
name, variant = sys.argv[1:]
if name not in [*WORKLOADS, "tiny"] or variant not in VARIANTS:
    sys.exit(f"peer: got {name!r} and {variant!r}: needs one of {[*WORKLOADS, 'tiny']} and one of {VARIANTS}")
workload = WORKLOADS.get(name, TINY)
cuda = name != "tiny"
device = torch.device("cuda" if cuda else "cpu")
folder = data_folder()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def make_model():
    """config.json, model.safetensors and tokenizer.json of a BERT with random weights."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    hidden, layers, heads, intermediate = SHAPES[workload.model]
    target = folder / workload.model
    if (target / "tokenizer.json").exists():  # it is written last
        return
    torch.manual_seed(SEED)
    labels = {"id2label": {i: str(i) for i in range(LABELS)}, "label2id": {str(i): i for i in range(LABELS)}}
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                        intermediate_size=intermediate, **labels)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(target)
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    if (got := tokenizer.encode("w77 w5").ids) != [CLS, 77, 5, SEP]:
        sys.exit(f"peer: the tokenizer makes {got} of two words: needs one token of each, and [CLS] and [SEP] around them")
    tokenizer.save(str(target / "tokenizer.json"))


def make_data():
    """Rows for a turn, some to validate on, and kiln's experiment over them."""
    draw = random.Random(SEED)
    length = lambda: workload.length or min(max(round(draw.lognormvariate(4.6, 0.8)), 8), 512)  # half below 100
    text = lambda: " ".join(f"w{draw.randrange(len(SPECIAL), VOCABULARY)}" for _ in range(length() - 2))
    for part, rows in (("train", workload.batch * (WARMUP + workload.steps)), ("validation", 2 * LABELS)):
        with open(folder / f"{name}-{part}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((text(), i % LABELS) for i in range(rows))])
    (folder / f"{name}.toml").write_text(f"""name = "{name}"
[data]
source = {{ train = "{name}-train.csv", validation = "{name}-validation.csv" }}
split = {{ test = 0.0 }}
max_length = 512
[[model]]
name = "bert"
path = "{workload.model}"
[train]
seed = {SEED}
batch_size = {workload.batch}
micro_batch_tokens = {workload.batch * 512}
""")


def batches():
    """The batches of kiln's first epoch in its order (src/data/sampler.rs), and their rows' lengths."""
    with open(folder / f"{name}-train.csv", encoding="utf-8", newline="") as file:
        texts = list(csv.reader(file))[1:]
    rows = [([CLS, *(int(word[1:]) for word in text.split()), SEP], int(label)) for text, label in texts]
    seed, epoch = SEED.to_bytes(8, "little"), (0).to_bytes(8, "little")
    order = sorted(range(len(rows)), key=lambda i: (hashlib.sha256(seed + epoch + i.to_bytes(4, "little")).digest(), i))
    for start in range(0, len(order), workload.batch):
        chunk = [rows[i] for i in order[start : start + workload.batch]]
        lengths = [len(ids) for ids, _ in chunk]
        width = -(-max(lengths) // 8) * 8
        inputs = {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chunk]),
            "attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in lengths]),
            "labels": torch.tensor([label for _, label in chunk]),
        }
        yield lengths, {key: tensor.pin_memory() if cuda else tensor for key, tensor in inputs.items()}


def synchronize():
    if cuda:
        torch.cuda.synchronize()


def peak():
    """Operations a second of a large product in bf16."""
    size = 8192 if cuda else 512
    x, y = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(15):
        synchronize()
        started = time.perf_counter()
        for _ in range(4):
            torch.matmul(x, y)
        synchronize()
        seconds.append((time.perf_counter() - started) / 4)
    return 2 * size**3 / statistics.median(seconds[5:])


class Contestant:
    def __init__(self):
        compiled, pure = variant.startswith("compiled"), variant.endswith("bf16 weights")
        torch.manual_seed(SEED)  # dropout
        # Rows of many lengths would be compiled again for the second; here one compilation serves all from the first.
        dynamo = TorchDynamoPlugin(backend="inductor", dynamic=True if workload.length is None else None)
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision="no" if pure else "bf16",
                                       dynamo_plugin=dynamo if compiled else None)  # fmt: skip
        model = BertForSequenceClassification.from_pretrained(
            folder / workload.model, attn_implementation="sdpa", dtype=torch.bfloat16 if pure else torch.float32
        ).to(device)
        decays = lambda name: not (name.endswith(".bias") or "LayerNorm" in name)
        groups = [
            {"params": [p for name, p in model.named_parameters() if decays(name)], "weight_decay": 0.01},
            {"params": [p for name, p in model.named_parameters() if not decays(name)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=5e-5, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model.train()
        self.lengths, self.batches = zip(*batches())

    def train(self, batches):
        """Seconds that steps on them take."""
        synchronize()
        started = time.perf_counter()
        for batch in batches:
            loss = self.model(**{key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - started

    def warm_up(self):
        widest = max(self.batches, key=lambda batch: batch["input_ids"].shape[1])
        self.train([*self.batches[:WARMUP], widest])

    def turn(self):
        self.train(self.batches[:WARMUP])
        seconds, lengths = self.train(self.batches[WARMUP:]), sum(self.lengths[WARMUP:], [])
        return {"seconds": seconds, "tokens": sum(lengths), "rows": len(lengths), "flops": flops(workload.model, lengths)}


for line in sys.stdin:
    if line.strip() == "build":
        folder.mkdir(parents=True, exist_ok=True)
        make_model()
        make_data()
        answer = {"peak_flops": peak()}
        contestant = Contestant()
        contestant.warm_up()
    else:
        answer = contestant.turn()
    if cuda:
        torch.cuda.empty_cache()  # what is kept would be missing to the next contestant
    print(json.dumps(answer), flush=True)
