"""What the Python contestants share: the command line, the inputs, and the line of JSON at the end."""

import argparse
import csv
import json
import os
import resource
import statistics
from pathlib import Path

cache = Path(os.environ.get("KILN_CACHE") or Path.home() / ".cache/kiln")
data = cache / "data"
peers = data / "peers"
LABELS = ["business", "entertainment", "politics", "sports", "tech"]  # of BBC, by id


def parse(description, workloads):
    """Every contestant takes all options, kiln's own too, and reads those that its workload needs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=workloads)
    parser.add_argument("--model", type=Path, default=peers / "minilm", help="a folder that prepare.py made")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=5, help="steps, or passes over the documents, that are timed")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, or batches")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of each row of a step")
    parser.add_argument("--data", type=Path, help="CSV with columns text, label")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--documents", type=int, help="the first rows of --data alone")
    return parser


def read(path, documents=None):
    """Texts and label ids of the first `documents` rows."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:documents]
    return [row["text"] for row in rows], [LABELS.index(row["label"]) for row in rows]


def step_inputs(batch, length):
    """Ids and labels of a step by a fixed rule: the same in every contestant."""
    ids = [[1000 + (i * 7919 + j * 104729) % 28000 for j in range(length)] for i in range(batch)]
    for row in ids:
        row[0], row[-1] = 101, 102
    return ids, [i % 5 for i in range(batch)]


def finish(contestant, arguments, seconds, versions, notes, **figures):
    """Prints the line. `figures` in lists, one value a step, become their medians."""
    medians = {key: statistics.median(value) if isinstance(value, list) else value for key, value in figures.items()}
    line = {"contestant": contestant, "workload": arguments.workload, "threads": arguments.threads, "seconds": seconds}
    line |= medians
    line |= {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    print(json.dumps(line | {"versions": versions, "notes": notes}), flush=True)
