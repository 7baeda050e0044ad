"""TF-IDF over words and word pairs with a linear SVM: the score that a fine-tuned model has to beat.

usage: bbc_tfidf.py [TRAIN TEST]      CSV or Parquet files with columns text and label (--text, --label name others);
by default the split that bbc_split.py makes. More training files: --more FILE…, as for a validation part that a model
was allowed to choose by. Prints one line of JSON.
"""

import argparse
import csv
import json
import os
import time
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.svm import LinearSVC

split = Path(os.environ.get("KILN_CACHE") or Path.home() / ".cache/kiln") / "data/bbc-split"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("train", type=Path, nargs="?", default=split / "train.csv")
parser.add_argument("test", type=Path, nargs="?", default=split / "test.csv")
parser.add_argument("--more", type=Path, nargs="+", default=[])
parser.add_argument("--text", default="text")
parser.add_argument("--label", default="label")
arguments = parser.parse_args()


def read(path):
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        table = parquet.read_table(path, columns=[arguments.text, arguments.label])
        return table[arguments.text].to_pylist(), [str(label) for label in table[arguments.label].to_pylist()]
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    return [row[arguments.text] for row in rows], [row[arguments.label] for row in rows]


texts, labels = read(arguments.train)
for path in arguments.more:
    more = read(path)
    texts, labels = texts + more[0], labels + more[1]
test_texts, truth = read(arguments.test)

started = time.perf_counter()
vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
classifier = LinearSVC(random_state=42).fit(vectorizer.fit_transform(texts), labels)
predictions = classifier.predict(vectorizer.transform(test_texts))
print(json.dumps({
    "train": len(texts), "test": len(truth), "labels": len(set(labels)),
    "accuracy": accuracy_score(truth, predictions),
    "macro_f1": f1_score(truth, predictions, average="macro", labels=sorted(set(labels) | set(truth)), zero_division=0),
    "seconds": round(time.perf_counter() - started, 2),
}))  # fmt: skip
