"""PyTorch eager with transformers' BertForSequenceClassification: a step, steps of an epoch, inference.

SDPA attention, fp32, AdamW with fused=True (what transformers' Trainer takes, and the fastest form on CPU), gradients
clipped to 1.0. An epoch's batches are padded to their longest row; inference is in batches of 8 sorted by length.
"""

import hashlib
import time

import torch
import transformers
from transformers import AutoTokenizer, BertForSequenceClassification

from contestant import data, finish, parse, read, step_inputs

SEED = 42
NOTES = ["eager", "SDPA", "AdamW fused=True"]
arguments = parse(__doc__, ["step-minilm", "step-bert-base", "epoch-bbc", "infer-bbc"]).parse_args()
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
torch.set_num_threads(arguments.threads)
torch.manual_seed(SEED)  # dropout
transformers.logging.disable_progress_bar()
model = BertForSequenceClassification.from_pretrained(arguments.model)


def tokenize(texts):
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    return tokenizer(texts, truncation=True, max_length=arguments.max_length)["input_ids"]


def batch_of(ids, labels):
    """Rows padded to their longest; a mask, as a tokenizer gives it."""
    rows = [torch.tensor(row) for row in ids]
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    inputs = {"input_ids": pad(rows), "attention_mask": pad([torch.ones_like(row) for row in rows])}
    return inputs | {"labels": torch.tensor(labels)}


def shuffled(rows):
    """The order of kiln's first epoch at seed 42 (src/data/sampler.rs), so that the batches are the same."""
    seed, epoch = SEED.to_bytes(8, "little"), (0).to_bytes(8, "little")
    return sorted(range(rows), key=lambda i: (hashlib.sha256(seed + epoch + i.to_bytes(4, "little")).digest(), i))


def train(batches):
    """`batches` are rows of (ids, labels); returns what each step took, by part of it, and the losses."""
    decays = lambda name: not (name.endswith(".bias") or "LayerNorm" in name)
    groups = [
        {"params": [p for name, p in model.named_parameters() if decays(name)], "weight_decay": 0.01},
        {"params": [p for name, p in model.named_parameters() if not decays(name)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-5, betas=(0.9, 0.999), eps=1e-8, fused=True)
    model.train()
    losses, times = [], {"seconds": [], "data": [], "forward": [], "backward": [], "optimizer": []}
    for step, (ids, labels) in enumerate(batches):
        clock = [time.perf_counter()]
        tick = lambda: clock.append(time.perf_counter())
        inputs = batch_of(ids, labels)
        tick()
        loss = model(**inputs).loss
        tick()
        loss.backward()
        tick()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tick()
        if step >= arguments.warmup:
            times["seconds"].append(clock[-1] - clock[0])
            for part, start, end in zip(("data", "forward", "backward", "optimizer"), clock, clock[1:]):
                times[part].append(end - start)
    return times, losses


def report(times, losses, tokens, examples):
    seconds = times.pop("seconds")
    times |= {"tokens_per_second": tokens / sum(seconds), "examples_per_second": examples / sum(seconds)}
    first, second = (losses + [None])[:2]
    finish("pytorch", arguments, seconds, versions, NOTES, loss=first, second_loss=second, **times)


def step():
    ids, labels = step_inputs(arguments.batch, arguments.length)
    times, losses = train([(ids, labels)] * (arguments.warmup + arguments.steps))
    report(times, losses, arguments.steps * arguments.batch * arguments.length, arguments.steps * arguments.batch)


def epoch():
    texts, labels = read(arguments.data or data / "bbc-split/train.csv")
    ids, order = tokenize(texts), shuffled(len(texts))
    chunks = [order[start : start + arguments.batch] for start in range(0, len(order), arguments.batch)]
    chunks = chunks[: arguments.warmup + arguments.steps]
    times, losses = train([([ids[i] for i in chunk], [labels[i] for i in chunk]) for chunk in chunks])
    timed = [i for chunk in chunks[arguments.warmup :] for i in chunk]
    report(times, losses, sum(len(ids[i]) for i in timed), len(timed))


def infer():
    texts, labels = read(arguments.data or data / "bbc-split/test.csv", arguments.documents)
    ids = tokenize(texts)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[start : start + 8] for start in range(0, len(order), 8)]
    model.eval()

    def run(batches):
        losses = []
        with torch.inference_mode():
            for batch in batches:
                inputs = batch_of([ids[i] for i in batch], [labels[i] for i in batch])
                targets = inputs.pop("labels")
                logits = model(**inputs).logits
                losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
        return sum(losses) / max(len(losses), 1)

    run(batches[len(batches) // 2 :][: arguments.warmup])
    seconds = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        loss = run(batches)
        seconds.append(time.perf_counter() - started)
    examples, tokens = len(ids) * arguments.steps, sum(map(len, ids)) * arguments.steps
    finish("pytorch", arguments, seconds, versions, [*NOTES[:2], "batches of 8, sorted"], loss=loss,
           examples_per_second=examples / sum(seconds), tokens_per_second=tokens / sum(seconds))  # fmt: skip


{"step": step, "epoch": epoch, "infer": infer}[arguments.workload.split("-")[0]]()
