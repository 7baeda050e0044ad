"""scikit-learn's figures for predictions of many shapes, as the reference for kiln's metrics.

usage: make_metrics.py [FILE]      FILE is by default metrics.json beside this file

Each case: name, labels (the number of classes), y_true, y_pred, accuracy, macro_f1, micro_f1, weighted_f1, and
per_label, a list by class with precision, recall, f1, support. All labels count, whether they occur or not, and what
would be 0/0 is 0.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

random = np.random.default_rng(42)


def noisy(labels, rows, right, weights=None):
    """Random truth, of which a share of predictions is right and the rest drawn evenly."""
    truth = random.choice(labels, rows, p=weights)
    return labels, truth, np.where(random.random(rows) < right, truth, random.integers(0, labels, rows))


def without(labels, rows, never, which):
    """A class that is never predicted, or never true."""
    labels, truth, prediction = noisy(labels, rows, 0.7)
    changed = prediction if which == "predicted" else truth
    changed[changed == never] = (never + 1) % labels
    return labels, truth, prediction


def uneven(labels, rows):
    """Class sizes from thousands to one, as in Reuters R52; every class occurs."""
    weights = 1.0 / np.arange(1, labels + 1) ** 2
    labels, truth, prediction = noisy(labels, rows - labels, 0.9, weights / weights.sum())
    return labels, np.append(truth, np.arange(labels)), np.append(prediction, random.integers(0, labels, labels))


CASES = {
    "two classes": noisy(2, 50, 0.8),
    "five classes": noisy(5, 200, 0.6),
    "many classes at random": noisy(20, 500, 0.0),
    "a class never predicted": without(4, 60, 2, "predicted"),
    "a class never true": without(4, 60, 1, "true"),
    "a class neither true nor predicted": (4, np.array([0, 1, 3, 3, 1]), np.array([0, 3, 3, 1, 1])),
    "one class": (1, np.zeros(7, int), np.zeros(7, int)),
    "one row, right": (3, np.array([2]), np.array([2])),
    "one row, wrong": (3, np.array([2]), np.array([0])),
    "all right": (3, np.arange(30) % 3, np.arange(30) % 3),
    "all wrong": (3, np.arange(30) % 3, (np.arange(30) + 1) % 3),
    "always the same prediction": (3, np.arange(31) % 3, np.ones(31, int)),
    "equal f1 of several classes": (4, np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 1, 1, 0, 2, 3, 3, 2])),
    "52 uneven classes": uneven(52, 2568),
}


def figures(name, labels, truth, prediction):
    options = dict(labels=range(labels), zero_division=0)
    per_label = precision_recall_fscore_support(truth, prediction, average=None, **options)
    return {
        "name": name,
        "labels": labels,
        "y_true": truth.tolist(),
        "y_pred": prediction.tolist(),
        "accuracy": float(accuracy_score(truth, prediction)),
        **{f"{average}_f1": float(f1_score(truth, prediction, average=average, **options)) for average in ("macro", "micro", "weighted")},
        "per_label": [
            {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
            for precision, recall, f1, support in zip(*per_label)
        ],
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "metrics.json"
    cases = [figures(name, *case) for name, case in CASES.items()]
    target.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    print(f"{target}: {len(cases)} cases")
