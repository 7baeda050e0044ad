"""Runs the contestants of each workload in turns (A B C, A B C, …), each as a process of its own, and pairs their
figures within each round. Prints Markdown; also writes benches/results/<date>-<machine>.md, with the raw lines in a
.jsonl beside it, unless --quick. Start it by run.sh, which prepares what is read.
"""

import argparse
import datetime
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from contestant import data, peers

root = Path(__file__).resolve().parents[2]
BBC = data / "bbc-split"
TOLERANCE = 1e-5  # of losses that should be the same
IDLE = 0.05  # share of the CPUs that other programs take, above which the machine counts as busy


@dataclass
class Contestant:
    name: str
    program: str  # a script here, or a bench of Cargo.toml
    options: list = field(default_factory=list)
    rounds: int | None = None  # fewer, where it is slow
    steps: int | None = None


@dataclass
class Workload:
    title: str
    key: str  # of the figure that is compared
    unit: str
    options: list
    steps: int
    warmup: int
    contestants: list
    columns: list  # beside the figure: (heading, function of a line)
    note: str
    quick: list = field(default_factory=list)  # options instead of those, where it has to be quick
    full: list = field(default_factory=list)  # and where all has to be seen
    full_steps: int | None = None
    compare_losses: str = ""  # "dropout-0": by runs without dropout; "pass": in the lines themselves


def seconds(key):
    return key, lambda line: line.get(key) and f"{line[key]:.3g} s"


PARTS = [seconds(part) for part in ("forward", "backward", "optimizer", "data")]
STEP = [("s/step", lambda line: f"{statistics.median(line['seconds']):.3g}"), *PARTS]
pytorch, step = Contestant("pytorch", "peer_pytorch.py"), Contestant("kiln", "step", ["--json"])
candle = Contestant("candle", "peer_candle", rounds=2, steps=2)
WORKLOADS = {
    "step-minilm": Workload(
        "A training step: MiniLM-L6, 16 × 128 tokens", "tokens_per_second", "tokens/s",
        ["--model", peers / "minilm", "--batch", 16, "--length", 128], 8, 2, [pytorch, candle, step], STEP,
        "fp32, dropout 0.1 (none in candle), AdamW, gradients clipped to 1.0; no row is padded.",
        compare_losses="dropout-0",
    ),
    "step-bert-base": Workload(
        "A training step: BERT-base, 8 × 128 tokens", "tokens_per_second", "tokens/s",
        ["--model", peers / "bert-base", "--batch", 8, "--length", 128], 4, 1, [pytorch, candle, step], STEP,
        "As above; random weights, the same in all.", compare_losses="dropout-0",
    ),
    "epoch-bbc": Workload(
        "Steps of an epoch: MiniLM-L6 on BBC, 16 rows of up to 256 tokens", "tokens_per_second", "tokens/s",
        ["--model", peers / "minilm", "--data", BBC / "train.csv", "--max-length", 256, "--batch", 16], 12, 2,
        [pytorch, step], [("s/example", lambda line: f"{sum(line['seconds']) / examples(line):.3g}"), *STEP],
        "Shuffled; tokens are real ones: the padding to a batch's longest row, which PyTorch computes, does not count.",
        full_steps=1530 // 16 - 2,
    ),
    "infer-bbc": Workload(
        "Inference: MiniLM-L6 on BBC, up to 512 tokens", "examples_per_second", "documents/s",
        ["--model", peers / "minilm", "--data", BBC / "test.csv", "--max-length", 512, "--documents", 160], 1, 2,
        [pytorch, Contestant("onnxruntime", "peer_onnxruntime.py"), Contestant("kiln", "infer")],
        [("tokens/s", lambda line: f"{line['tokens_per_second']:.0f}")],
        "Tokenized beforehand in all; a pass over the first 160 documents of the test part (all with --full).",
        quick=["--documents", 16], full=["--documents", 10**9], compare_losses="pass",
    ),
    "encode-bbc": Workload(
        "Encoding: texts to token ids in an Arrow file, up to 256 tokens", "rows_per_second", "rows/s",
        ["--model", peers / "minilm", "--data", peers / "bbc-repeated.csv", "--max-length", 256], 1, 0,
        [Contestant("datasets", "peer_datasets.py"),
         Contestant("datasets, one process", "peer_datasets.py", ["--processes", 0]),
         Contestant("kiln", "data", ["--what", "encode"])],
        [("MB/s", lambda line: f"{line['megabytes_per_second']:.3g}"),
         ("tokenizing alone, rows/s", lambda line: f"{line['mapping_rows_per_second']:.0f}")],
        "BBC's train part eight times. `datasets` maps in as many processes as threads; its figure holds their start, "
        "'tokenizing alone' does not. kiln's figure holds the count of what is cut off, the sync and the hash; 'tokenizing "
        "alone' is `encode_texts`, which stops where a row is full. Memory is that of the first process.",
        quick=["--data", BBC / "test.csv"],
    ),
    "load-bbc": Workload(
        "Loading: every batch of an encoded epoch, 16 rows of up to 256 tokens", "rows_per_second", "rows/s",
        ["--model", peers / "minilm", "--data", peers / "bbc-repeated.csv", "--max-length", 256, "--batch", 16], 1, 0,
        [Contestant("kiln", "data", ["--what", "load"])],
        [("tokens/s", lambda line: f"{line['tokens_per_second']:.3g}"),
         ("µs/batch", lambda line: f"{statistics.median(line['seconds']) * 1e6:.1f}")],
        "From the mapped file to the packed inputs of the forward: what a step waits for its data.",
        quick=["--data", BBC / "test.csv"],
    ),
}  # fmt: skip


def examples(line):
    if "examples_per_second" in line:
        return line["examples_per_second"] * sum(line["seconds"])
    return 16 * len(line["seconds"])


def say(message):
    print(message, file=sys.stderr, flush=True)


def build(names):
    """The benches' executables by name."""
    command = ["cargo", "bench", "--locked", "--no-run", "--message-format", "json-render-diagnostics"]
    for name in sorted(names):
        command += ["--bench", name]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"run: {' '.join(command)} failed")
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    benches = [message for message in messages if message.get("executable") and "bench" in message["target"]["kind"]]
    return {message["target"]["name"]: message["executable"] for message in benches}


def busy():
    """Seconds that all CPUs have been busy, time stolen from this machine included."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(contestant, workload, name, options):
    """One process; its line, or one that holds its error."""
    program = [sys.executable, root / "benches/peers" / contestant.program]
    if not contestant.program.endswith(".py"):
        program = [executables[contestant.program]]
    command = [*program, name, "--threads", arguments.threads, *options, *contestant.options]
    before, others, started = own(), busy(), time.monotonic()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    wall = time.monotonic() - started
    others = max(busy() - others - (own() - before), 0) / (wall * os.cpu_count())
    try:
        if done.returncode:
            raise ValueError
        line = json.loads(done.stdout.splitlines()[-1])
        if name.startswith("step-"):  # the same statistic of all
            tokens = options[options.index("--batch") + 1] * options[options.index("--length") + 1]
            line["tokens_per_second"] = tokens / statistics.median(line["seconds"])
        line["contestant"] = contestant.name
        return line | {"cpu_of_others": round(others, 4)}
    except (ValueError, IndexError, KeyError):
        say(done.stderr)
        said = done.stderr.strip() or "it said nothing"
        end = said[max(said.rfind("Error:"), said.rfind("error:")) :] if "rror:" in said else said.splitlines()[-1]
        error = f"exit code {done.returncode}: {' '.join(end.split())[:300]}"
        return {"contestant": contestant.name, "workload": name, "error": error}


def options_of(workload, contestant):
    """The workload's options, with those of --quick or --full in place of the same."""
    options = list(workload.options)
    changed = workload.quick if arguments.quick else workload.full if arguments.full else []
    for key, value in zip(changed[::2], changed[1::2]):
        options[options.index(key) + 1] = value
    steps, warmup = contestant.steps or workload.steps, workload.warmup
    if arguments.quick:
        steps, warmup = min(steps, 2), min(warmup, 1)
    elif arguments.full and workload.full_steps:
        steps = workload.full_steps
    return options, ["--steps", steps, "--warmup", warmup]


def measure(name, workload):
    """All lines of a workload, each with its round."""
    lines = []
    for turn in range(1, arguments.rounds + 1):
        for contestant in workload.contestants:
            if contestant.rounds and turn > contestant.rounds:
                continue
            options, steps = options_of(workload, contestant)
            line = run(contestant, workload, name, [*options, *steps]) | {"round": turn}
            lines.append(line)
            figure = line.get("error") or f"{line[workload.key]:.4g} {workload.unit}"
            say(f"{name} round {turn} of {arguments.rounds}, {contestant.name}: {figure}")
    return lines


def check_losses(name, workload, lines):
    """What the contestants' losses are, as text, and what is wrong with them."""
    if workload.compare_losses == "dropout-0":
        lines = []
        for contestant in workload.contestants:
            options, _ = options_of(workload, contestant)
            model = options.index("--model") + 1
            options[model] = Path(f"{options[model]}-dropout-0")
            lines.append(run(contestant, workload, name, [*options, "--steps", 2, "--warmup", 0]))
        kinds = {"loss": "First loss without dropout", "second_loss": "after one update"}
    elif workload.compare_losses == "pass":
        lines = [line for line in lines if line["round"] == 1 and "error" not in line]
        kinds = {"loss": "Mean loss over the documents"}
    else:
        return "", []
    texts, wrong = [], []
    for line in lines:
        if line.get("loss") is None:
            wrong.append(f"{name}, {line['contestant']}: no loss to compare: {line.get('error', 'its line has none')}")
    for key, kind in kinds.items():
        given = {line["contestant"]: line[key] for line in lines if line.get(key) is not None}
        texts.append(f"{kind}: " + ", ".join(f"{contestant} {loss:.7f}" for contestant, loss in given.items()))
        spread = max(given.values(), default=0) - min(given.values(), default=0)
        if key == "loss" and spread > TOLERANCE:
            wrong.append(f"{name}: losses differ by {spread:.1e}, more than {TOLERANCE:.0e}: {texts[-1]}")
    return "; ".join(texts) + ".", wrong


def spread(values, form):
    """Median and range."""
    middle = form(statistics.median(values))
    return middle if len(values) < 2 else f"{middle} ({form(min(values))}–{form(max(values))})"


def table(workload, lines):
    """Markdown rows, a contestant each: medians over its rounds, ratios of the same round."""
    times, plain = (lambda x: f"{x:.2f}×"), (lambda x: f"{x:.4g}")
    kiln = {line["round"]: line for line in lines if line["contestant"] == "kiln" and "error" not in line}
    limit = "limit_tokens_per_second"
    limits = {turn: line[limit] for turn, line in kiln.items() if line.get(limit)}
    headings = ["", workload.unit, *(["of the product limit"] if limits else [])]
    headings += [heading for heading, _ in workload.columns] + ["peak memory"]
    headings += ["kiln ÷ it"] if len(workload.contestants) > 1 else []
    rows = [headings, ["---"] * len(headings)]
    for contestant in workload.contestants:
        mine = [line for line in lines if line["contestant"] == contestant.name]
        errors = [line["error"] for line in mine if "error" in line]
        if errors:
            rows.append([contestant.name, f"failed: {errors[0]}".replace("|", "/"), *[""] * (len(headings) - 2)])
            continue
        figures = {line["round"]: line[workload.key] for line in mine}
        row = [contestant.name, spread(figures.values(), plain)]
        if limits:
            shares = [figure / limits[turn] for turn, figure in figures.items() if turn in limits]
            row.append(f"{statistics.median(shares):.0%}" if shares else "")
        typical = sorted(mine, key=lambda line: line[workload.key])[len(mine) // 2]
        row += [column(typical) or "" for _, column in workload.columns]
        row.append(f"{statistics.median(line['peak_rss_bytes'] for line in mine) / 1e6:.0f} MB")
        if len(workload.contestants) > 1:
            ratios = [kiln[turn][workload.key] / figure for turn, figure in figures.items() if turn in kiln]
            row.append("" if contestant.name == "kiln" else spread(ratios, times) if ratios else "kiln failed")
        rows.append(row)
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return text, spread(limits.values(), lambda x: f"{x:.0f}") if limits else None


def described(lines):
    """Versions and notes that the contestants give of themselves."""
    seen = {line["contestant"]: line for line in lines if "error" not in line}
    texts = []
    for contestant, line in seen.items():
        versions = [f"{package} {version}" for package, version in line.get("versions", {}).items()]
        texts.append(f"{contestant}: " + ", ".join([*versions, *line.get("notes", [])]))
    return "; ".join(texts) + "."


def machine():
    """The CPU's name as people say it, as a file's name has it, and what it computes with."""
    with open("/proc/cpuinfo") as file:
        first = file.read().split("\n\n")[0].splitlines()
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    name = entries.get("model name", os.uname().machine)
    flags = entries.get("flags", "").split()
    vectors = next((kind for flag, kind in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "no AVX2")
    cores = len(os.sched_getaffinity(0))
    short = re.sub(r"\(.*?\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", " ", name)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{short} {cores} cores".lower()).strip("-")
    family, model = entries.get("cpu family", "?"), entries.get("model", "?")
    return f"{name} (family {family}, model {model}, {vectors}), {cores} cores", slug


def commit():
    git = lambda *words: subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()
    changed = " and changes" if git("status", "--porcelain", "-uno") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, or how their names begin; all: %(default)s")
parser.add_argument("--rounds", type=int)
parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
parser.add_argument("--quick", action="store_true", help="one round of few steps, to see that it works; writes no file")
parser.add_argument("--full", action="store_true", help="the whole epoch, the whole test part")
parser.add_argument("--output", type=Path, help="the Markdown file, in place of benches/results/<date>-<machine>.md")
arguments = parser.parse_args()
arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
wanted = arguments.only.split(",")
for want in wanted:
    if not any(name.startswith(want) for name in WORKLOADS):
        parser.error(f"no workload is called {want!r}; there are {', '.join(WORKLOADS)}")
chosen = {name: workload for name, workload in WORKLOADS.items() if any(name.startswith(want) for want in wanted)}

load = os.getloadavg()[0]
cpu, slug = machine()
say(f"{cpu}; load average {load:.2f}")
programs = {contestant.program for workload in chosen.values() for contestant in workload.contestants}
executables = build(program for program in programs if not program.endswith(".py"))
environment = os.environ | {"HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0"}
library = next(Path(sys.prefix).glob("lib/python*/site-packages/onnxruntime/capi/libonnxruntime.so.1.*"), None)
if library:
    environment.setdefault("ORT_DYLIB_PATH", str(library))  # the same build for Python and kiln

started, all_lines, sections, wrong = time.monotonic(), [], [], []
for name, workload in chosen.items():
    lines = measure(name, workload)
    all_lines += lines
    wrong += [f"{name}, {line['contestant']}: {line['error']}" for line in lines if "error" in line]
    losses, differing = check_losses(name, workload, lines)
    wrong += differing
    rows, limit = table(workload, lines)
    limit = f"Product limit, the step's matrix products alone: {limit} tokens/s." if limit else ""
    notes = " ".join(note for note in (workload.note, limit, losses) if note)
    sections.append(f"## {workload.title}\n\n{rows}\n\n{notes}\n\n{described(lines)}")

shares = [line["cpu_of_others"] for line in all_lines if "error" not in line]
others = statistics.median(shares or [0])
date = datetime.date.today().isoformat()
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
conditions = (
    f"{cpu}; {memory:.0f} GiB; {arguments.threads} threads; "
    f"kiln at {commit()}. Contestants in turns, each a process of its own; rounds: {arguments.rounds}, candle 2 "
    "at most. Medians over the rounds, the range in brackets; ratios are of figures of the same round. Load average at "
    f"the start {load:.2f}; meanwhile other programs took {others:.0%} of the CPUs in the median, "
    f"{max(shares, default=0):.0%} at most."
)
if others > IDLE:
    conditions += "\n\n**The machine was not idle: programs suffer from that differently, no figure or ratio counts.**"
if wrong:
    conditions += "\n\n**Not as it should be:**\n" + "\n".join(f"- {what}" for what in wrong)
text = f"# kiln beside what its users have, {date}\n\n{conditions}\n\n" + "\n\n".join(sections) + "\n"
command = " ".join(["benches/peers/run.sh", *sys.argv[1:]])
text += f"\n`{command}`, {(time.monotonic() - started) / 60:.0f} minutes.\n"
print(text, flush=True)
if not arguments.quick:
    target = arguments.output or root / f"benches/results/{date}-{slug}.md"
    number = 2
    while not arguments.output and target.exists():
        target = target.with_name(f"{date}-{slug}-{number}.md")
        number += 1
    target.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in all_lines))
    target.write_text(text.rstrip("\n") + f" Raw lines: {target.with_suffix('.jsonl').name}.\n")
    say(f"written: {target}")
for what in wrong:
    say(f"run: {what}")
sys.exit(1 if wrong else 0)
