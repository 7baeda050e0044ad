"""The rows of BBC News that kiln and its peers are compared on: data/bbc -> data/bbc-split/{train,validation,test}.csv.

Exact duplicates are dropped (the first in path order stays), then 80/20 stratified with random_state=42, then a
tenth of the training part becomes validation, by the same rule. Fetch first: experiments/fetch.sh bbc.
"""

import argparse
import csv
import os
from pathlib import Path

from sklearn.model_selection import train_test_split

cache = Path(os.environ.get("KILN_CACHE") or Path.home() / ".cache/kiln")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--source", type=Path, default=cache / "data/bbc", help="one folder a class")
parser.add_argument("--output", type=Path, default=cache / "data/bbc-split")
arguments = parser.parse_args()

label_of = {}  # text -> label, in path order
paths = sorted(arguments.source.glob("*/*.txt"))
for path in paths:
    text = path.read_bytes().decode("utf-8").strip()
    if label_of.setdefault(text, path.parent.name) != path.parent.name:
        raise SystemExit(f"{path}: the same text is also labelled {label_of[text]!r}")

rows = list(label_of.items())
split = dict(random_state=42, shuffle=True)
rest, test = train_test_split(rows, test_size=0.2, stratify=[label for _, label in rows], **split)
train, validation = train_test_split(rest, test_size=0.1, stratify=[label for _, label in rest], **split)

arguments.output.mkdir(parents=True, exist_ok=True)
for name, part in (("train", train), ("validation", validation), ("test", test)):
    target = arguments.output / f"{name}.csv"
    temporary = target.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(part)
    os.replace(temporary, target)
    print(f"{target}: {len(part)} rows")
print(f"{len(paths)} documents, {len(paths) - len(rows)} exact duplicates dropped")
