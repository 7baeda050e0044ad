"""What run.sh's stages found, as tables.

report.py --start KILN FILE    begins a file of lines: which GPU, whose versions
report.py FILE…                prints the tables of one or more such files; --output FOLDER keeps them
"""

import argparse
import datetime
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

from compare import TINY, WORKLOADS, emit

PACKAGES = ["torch", "transformers", "accelerate"]
NOTE = """Medians over the rounds, the range in brackets; ratios are of figures of the same round. Tokens are real ones, never \
padding. The share of the peak counts the products that each one's model takes for them, forward and backward; kiln leaves out \
rows that nothing reads. Memory is what was taken of the card, the context included. kiln waits for the card after each step, \
the others after a turn's last.
"""

def spread(values, show):
    """Median, and the range where there is one."""
    values = sorted(values)
    text = show(statistics.median(values))
    return text if values[0] == values[-1] else f"{text} ({show(values[0])}–{show(values[-1])})"


def figures(turn, peak):
    rates = {key: turn[key] / turn["seconds"] for key in ("tokens", "rows")}
    share = turn["flops"] / turn["seconds"] / peak if peak else None
    return rates | {"share": share, "memory": turn["peak_memory_bytes"]}


def speeds(name, lines):
    """A workload's table, and what it comes to."""
    workload = WORKLOADS.get(name, TINY)
    turns = [line for line in lines if "error" not in line]
    peak = max((turn["peak_flops"] for turn in turns), default=0)
    rounds = {(turn["contestant"], turn["round"]): figures(turn, peak) for turn in turns}
    contestants = list(dict.fromkeys(contestant for contestant, _ in rounds))
    rows = [["", "sequences/s", "tokens/s", "of the bf16 peak", "peak memory", "kiln ÷ it"], ["---"] * 6]
    times, percent = lambda x: f"{x:.2f}×", lambda x: f"{x:.1%}"
    mine = {number: one["tokens"] for (contestant, number), one in rounds.items() if contestant == "kiln"}
    for contestant in sorted(contestants, key="kiln".__eq__):
        its = {number: one for (other, number), one in rounds.items() if other == contestant}
        of = lambda key, show: spread([one[key] for one in its.values()], show) if its[min(its)][key] else "–"
        ratios = [mine[number] / one["tokens"] for number, one in its.items() if number in mine]
        ratio = "" if contestant == "kiln" else spread(ratios, times) if ratios else "–"
        rows.append([contestant, of("rows", "{:.0f}".format), of("tokens", "{:.0f}".format), of("share", percent),
                     of("memory", lambda x: f"{x / 2**30:.1f} GiB"), ratio])  # fmt: skip
    text = f"## {workload.title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
    best = {}  # of the others, by round
    for (contestant, number), one in rounds.items():
        if contestant != "kiln":
            best[number] = max(best.get(number, 0), one["tokens"])
    ratios = [mine[number] / best[number] for number in mine if number in best]
    if ratios:
        text += f"\nkiln ÷ the best of each round: {spread(ratios, times)}"
        text += f"; the aim is {times(workload.ratio)}" if workload.ratio else ""
        text += f", at {workload.share:.0%} of the peak" if workload.share else ""
        text += ".\n"
    text += f"\nPeak measured here: {peak / 1e12:.0f} TFLOP/s in bf16.\n" if peak else ""
    return text + "".join(f"\n{line['contestant']}: {line['error']}\n" for line in lines if "error" in line)


def text_of(lines):
    machines = [line for line in lines if "gpu" in line]
    gpus = " and ".join(dict.fromkeys(line["gpu"] for line in machines))
    versions = "\n\n".join(dict.fromkeys(line["versions"] for line in machines))
    parts = [f"# kiln on {gpus}, {machines[0]['date']}\n\n{versions}\n"]
    if stages := [line for line in lines if "limit" in line]:
        rows = [["stage", "result", "seconds", "what was found"], ["---"] * 4]
        for stage in stages:
            found = [line for line in lines if line.get("stage") == stage["stage"] and "check" in line]
            found = "; ".join(f"{line['check']}: {line['result']}, {line['detail']}" for line in found)
            rows.append([stage["stage"], stage["result"], str(stage["seconds"]), found.replace("|", "/")])
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
    names = dict.fromkeys(line["workload"] for line in lines if "workload" in line)
    parts += [speeds(name, [line for line in lines if line.get("workload") == name]) for name in names]
    return "\n".join([*parts, NOTE] if names else parts)


def start(kiln, path):
    """The line that says where and of what the others are."""

    def ask(*words):
        try:
            return subprocess.run(words, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    fields = ask("nvidia-smi", "-i", "0", "--query-gpu=name,driver_version", "--format=csv,noheader")
    gpu, _, driver = fields.partition(", ")
    packages = [package for package in PACKAGES if any(importlib.metadata.distributions(name=package))]
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    commit = ask("git", "rev-parse", "--short", "HEAD") or "an unknown commit"
    versions = ", ".join([f"driver {driver or 'none'}", *versions, f"{ask(kiln, '--version') or 'no kiln'} at {commit}"])
    emit(path, gpu=gpu or "no GPU", date=datetime.date.today().isoformat(), versions=versions)


def report(arguments):
    lines = [json.loads(line) for path in arguments.files for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if not any("gpu" in line for line in lines):
        sys.exit(f"report: {' '.join(arguments.files)}: no line says which GPU: needs files that run.sh wrote")
    text = text_of(lines)
    print(text)
    if arguments.output:
        first = next(line for line in lines if "gpu" in line)
        slug = re.sub(r"[^a-z0-9]+", "-", first["gpu"].lower()).strip("-")
        target = arguments.output / f"{first['date']}-{slug}{arguments.suffix}.md"
        number = 2
        while target.exists():
            target = target.with_name(f"{first['date']}-{slug}{arguments.suffix}-{number}.md")
            number += 1
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"written: {target}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--start", metavar="KILN")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    parser.add_argument("--suffix", default="", help="of the files' names there")
    arguments = parser.parse_args()
    start(arguments.start, arguments.files[0]) if arguments.start else report(arguments)
