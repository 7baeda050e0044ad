"""BBC News by PyTorch and transformers: the recipe of experiments/bbc.toml, for comparison with kiln's result.

Reads train.csv, validation.csv and test.csv (columns text, label) as bbc_split.py makes them; writes a JSON file,
anew after each seed. Speed counts real tokens, not padding.
"""

import argparse
import csv
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

cache = Path(os.environ.get("KILN_CACHE") or Path.home() / ".cache/kiln")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=cache / "data/bbc-split")
parser.add_argument("--model", type=Path, default=cache / "data/all-MiniLM-L6-v2")
parser.add_argument("--output", type=Path, default=Path("bbc_pytorch.json"))
parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=5e-5)
parser.add_argument("--weight-decay", type=float, default=0.01)
parser.add_argument("--warmup-ratio", type=float, default=0.1)
parser.add_argument("--max-length", type=int, default=256)
parser.add_argument("--max-steps", type=int, help="stop early: to try the script out")
parser.add_argument("--threads", type=int, default=os.cpu_count())
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)

tokenizer = AutoTokenizer.from_pretrained(arguments.model)


def read(part):
    with open(arguments.data / f"{part}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


parts = {part: read(part) for part in ("train", "validation", "test")}
labels = sorted({row["label"] for row in parts["train"]})
examples = {
    part: [
        (ids, labels.index(row["label"]))
        for row, ids in zip(
            rows,
            tokenizer([row["text"] for row in rows], truncation=True, max_length=arguments.max_length)["input_ids"],
        )
    ]
    for part, rows in parts.items()
}


def batch_of(chosen):
    inputs = tokenizer.pad({"input_ids": [ids for ids, _ in chosen]}, return_tensors="pt")
    return inputs, torch.tensor([label for _, label in chosen])


def evaluate(model, part):
    model.eval()
    order = sorted(range(len(examples[part])), key=lambda i: len(examples[part][i][0]))
    truth, predictions = [], []
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            inputs, target = batch_of([examples[part][i] for i in order[start : start + 32]])
            truth += target.tolist()
            predictions += model(**inputs).logits.argmax(-1).tolist()
    return {
        "macro_f1": f1_score(truth, predictions, average="macro", labels=range(len(labels)), zero_division=0),
        "accuracy": accuracy_score(truth, predictions),
    }


def train(seed):
    torch.manual_seed(seed)  # the classifier's first weights, and dropout
    shuffle = torch.Generator().manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(labels), hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    decays = lambda name: not (name.endswith(".bias") or "LayerNorm" in name)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in model.named_parameters() if decays(name)], "weight_decay": arguments.weight_decay},
            {"params": [p for name, p in model.named_parameters() if not decays(name)], "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate, betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    total = math.ceil(len(examples["train"]) / arguments.batch_size) * arguments.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(total * arguments.warmup_ratio), total)

    best, epochs, step, tokens, seconds = None, [], 0, 0, 0.0
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        loss_sum, started = 0.0, time.perf_counter()
        order = torch.randperm(len(examples["train"]), generator=shuffle).tolist()
        for start in range(0, len(order), arguments.batch_size):
            inputs, target = batch_of([examples["train"][i] for i in order[start : start + arguments.batch_size]])
            loss = model(**inputs, labels=target).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss_sum += loss.item() * len(target)
            tokens += int(inputs["attention_mask"].sum())
            step += 1
            if step == arguments.max_steps:
                break
        seconds += time.perf_counter() - started
        validation = evaluate(model, "validation")
        epochs.append({"epoch": epoch, "train_loss": loss_sum / len(order), **validation})
        print(f"seed={seed} epoch={epoch} step={step} train_loss={loss_sum / len(order):.4f}"
              f" validation_macro_f1={validation['macro_f1']:.4f} tokens/s={tokens / seconds:.0f}", flush=True)  # fmt: skip
        if best is None or validation["macro_f1"] > best["validation"]["macro_f1"]:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            best = {"epoch": epoch, "validation": validation}
        if step == arguments.max_steps:
            break
    model.load_state_dict(weights)
    test = evaluate(model, "test")
    print(f"seed={seed} best_epoch={best['epoch']} test_macro_f1={test['macro_f1']:.4f} test_accuracy={test['accuracy']:.4f}", flush=True)
    return {
        "seed": seed, "best_epoch": best["epoch"],
        "test_macro_f1": test["macro_f1"], "test_accuracy": test["accuracy"],
        "validation_macro_f1": best["validation"]["macro_f1"],
        "train_seconds": seconds, "train_tokens": tokens, "tokens_per_second": tokens / seconds, "epochs": epochs,
    }  # fmt: skip


def cpu():
    with open("/proc/cpuinfo") as file:
        return next((line.split(": ", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())


result = {
    "torch": torch.__version__, "transformers": transformers.__version__, "cpu": cpu(), "niceness": os.nice(0),
    "recipe": {key: value for key, value in vars(arguments).items() if key not in ("data", "model", "output")},
    "rows": {part: len(rows) for part, rows in parts.items()}, "labels": labels, "seeds": [],
}  # fmt: skip
for seed in arguments.seeds:
    result["seeds"].append(train(seed))
    for figure in ("test_macro_f1", "test_accuracy", "validation_macro_f1"):
        values = [run[figure] for run in result["seeds"]]
        result[f"mean_{figure}"] = sum(values) / len(values)
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, arguments.output)
