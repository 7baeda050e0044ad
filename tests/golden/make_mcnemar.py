"""SciPy's p-values of McNemar's exact test, as the reference for kiln's.

usage: make_mcnemar.py [FILE]      FILE is by default mcnemar.json beside this file

A list of [only_a, only_b, p]: rows that one classifier alone has right, and the two-sided binomial test of them.
"""

import json
import sys
from pathlib import Path

from scipy.stats import binomtest

PAIRS = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 5), (5, 0), (3, 7), (7, 3), (1, 9), (10, 10), (11, 10), (12, 20)]
PAIRS += [(n // 3, n - n // 3) for n in (17, 50, 99, 100, 101, 500, 1000)]
PAIRS += [(37, 21), (20, 17), (121, 59), (1000, 1100), (1100, 1000), (1000, 1001), (4990, 5010), (0, 60), (0, 1000)]
PAIRS += [(500_000, 501_000), (500_000, 505_000), (499_999, 500_001), (10_000_000, 10_005_000), (1_000_000, 1_000_000)]


def p_value(a, b):
    return float(binomtest(a, a + b, 0.5).pvalue) if a + b else 1.0


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "mcnemar.json"
    cases = [[a, b, p_value(a, b)] for a, b in PAIRS]
    target.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    print(f"{target}: {len(cases)} cases")
