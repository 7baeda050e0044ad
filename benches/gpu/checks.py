"""Tries what kiln does on a GPU, and adds a line of JSON for each thing tried.

checks.py tests    the kernels', models' and golden files' tests on CUDA, each in a process of its own: what one breaks
                   on the card, another does not see
checks.py train    the embedded sample: its macro-F1, and a run that is killed and resumed beside two that are not
checks.py nccl     kiln's group by NCCL: one rank, and two on one card where NCCL allows that, which then train too
Exits with 0, 1 where something failed, 3 where nothing failed but all was skipped.
"""

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import emit

# Binaries that ci/build-cuda.sh makes, and how the tests are called that need a GPU.
TESTS = {"kernels-tests": "cuda", "models-tests": "on_cuda", "integration-tests": "on_cuda"}
TEST_SECONDS = 60
MACRO_F1 = 0.95
KILL_AT = 150  # of the sample's 318 steps
SAVE_STEPS = 20
# The NCCL that lets two ranks share a card, and how it is told to.
TWO_RANKS_SINCE, TWO_RANKS = (2, 30, 3), {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}

results = []


def found(check, result, detail):
    """`result` is passed, failed, skipped or not run."""
    results.append(result)
    print(f"{arguments.stage}: {check}: {result}, {detail}", file=sys.stderr, flush=True)
    emit(arguments.lines, stage=arguments.stage, check=check, result=result, detail=detail)


def one_test(binary, name):
    """passed, skipped, or why it failed."""
    command = [binary, "--exact", name, "--nocapture", "--test-threads=1"]
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"does not end within {TEST_SECONDS} s"
    if run.returncode == 0:
        return "skipped" if "skipped: " in run.stdout else "passed"
    print(run.stdout, file=sys.stderr)
    return f"died of {signal.Signals(-run.returncode).name}" if run.returncode < 0 else f"status {run.returncode}"


def tests():
    for file, part in TESTS.items():
        binary = arguments.binaries / file
        if not binary.exists():
            found(file, "failed", f"{binary} is not there: make it by ci/build-cuda.sh and bring it")
            continue
        listed = subprocess.run([binary, "--list"], capture_output=True, text=True)
        names = [line.removesuffix(": test") for line in listed.stdout.splitlines() if line.endswith(": test")]
        names = [name for name in names if part in name]
        if not names:
            why = listed.stderr.strip() or f"it has no test with {part!r} in its name: build it with the feature cuda"
            found(file, "failed", why)
            continue
        said = {name: one_test(binary, name) for name in names}
        passed, skipped = ([name for name in names if said[name] == what] for what in ("passed", "skipped"))
        failed = [f"{name} ({said[name]})" for name in names if name not in passed + skipped]
        detail = f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped"
        result = "failed" if failed else "passed" if passed else "skipped"
        found(file, result, detail + (": " + ", ".join(failed) if failed else ""))


def kiln(root, dtype, *more):
    on_cuda = ["--set", "train.device=cuda", "--set", f"train.dtype={dtype}"] if arguments.device == "cuda" else []
    command = [arguments.binaries / "kiln", "train", "--root", root, "--stop-after", "train", "--offline"]
    return [*command, *on_cuda, "--set", f"train.save_steps={SAVE_STEPS}", *more]


def train_once(root, dtype, *more, **environment):
    """The folder of the trained model, None where kiln failed; and what it said."""
    run = subprocess.run(kiln(root, dtype, *more), capture_output=True, text=True, env=os.environ | environment)
    print(run.stderr, file=sys.stderr)
    return (root / "quickstart/runs/1/small-bert" if run.returncode == 0 else None), run.stderr


def last_words(said):
    return "its last words: " + " ".join(said.split())[-300:]


def macro_f1(folder):
    return json.loads((folder / "statistics.json").read_text())["macro_f1"]


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model/model.safetensors")


def distance(a, b):
    """‖a - b‖ / ‖a‖ over all weights."""
    square = lambda values: float((values.astype("float64") ** 2).sum())
    return (sum(square(a[name] - b[name]) for name in a) / sum(square(a[name]) for name in a)) ** 0.5


def last_step(root):
    """Of metrics.jsonl's whole lines."""
    file = root / "quickstart/runs/1/small-bert/metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def kill_in_the_middle(root, dtype):
    process = subprocess.Popen(kiln(root, dtype), stdout=subprocess.DEVNULL)
    while process.poll() is None and last_step(root) < KILL_AT:
        time.sleep(0.002)
    process.kill()
    return process.wait() == -signal.SIGKILL


def train():
    dtypes = ["f32"] if arguments.device == "cpu" else ["bf16"] if arguments.quick else ["f32", "bf16"]
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as folder:
            first, second, third = (Path(folder) / name for name in ("first", "second", "killed"))
            started = time.monotonic()
            model, said = train_once(first, dtype)
            if not model:
                found(f"{dtype} macro-F1", "failed", last_words(said))
                continue
            seconds, f1 = time.monotonic() - started, macro_f1(model)
            result = "passed" if f1 >= MACRO_F1 else "failed"
            found(f"{dtype} macro-F1", result, f"{f1:.4f} (at least {MACRO_F1}) in {seconds:.1f} s")
            again, said = train_once(second, dtype)
            if not kill_in_the_middle(third, dtype):
                found(f"{dtype} resumed", "failed", f"the run ended by itself before step {KILL_AT} was seen")
                continue
            steps = last_step(third)
            resumed, words = train_once(third, dtype)
            if not again or not resumed or "resuming quickstart/1 at step" not in words:
                found(f"{dtype} resumed", "failed", last_words(words if again else said))
                continue
            # Sums in another order are other bits: two whole runs say how far that goes.
            apart, usual = distance(weights(model), weights(resumed)), distance(weights(model), weights(again))
            result = "passed" if apart <= 3 * usual and last_step(third) == last_step(first) else "failed"
            detail = "the same bits" if apart == 0 else f"weights {apart:.1e} from an uninterrupted run's"
            detail += f", two whole runs {'have the same' if usual == 0 else f'are {usual:.1e} apart'}"
            found(f"{dtype} killed at step {steps} and resumed", result, detail)


def group(check, ranks, work, **environment):
    """What `work` says of its success with NCCL's log switched on; without a group in that log it shows nothing."""
    with tempfile.TemporaryDirectory() as folder:
        logs = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/nccl.%p"}
        passed, said = work(Path(folder), environment | logs)
        log = "".join(file.read_text(errors="replace") for file in Path(folder).glob("nccl.*"))
        if passed and not re.search(rf"nranks {ranks} .*Init COMPLETE", log):
            passed, said = False, f"NCCL's log has no group of {ranks}: build kiln with the feature nccl"
        found(check, "passed" if passed else "failed", said)


def conforms(_, environment):
    """The test of kiln's group: a training of one rank takes no group at all."""
    command = [arguments.binaries / "kiln-tests", "nccl_conforms", "--nocapture"]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment)
    print(run.stdout, file=sys.stderr)
    return run.returncode == 0, "sums and broadcasts are right" if run.returncode == 0 else last_words(run.stdout)


def train_by_two(folder, environment):
    model, said = train_once(folder / "root", "f32", "--nproc-per-node", "2", **environment)
    f1 = macro_f1(model) if model else 0
    return f1 >= MACRO_F1, f"macro-F1 {f1:.4f} (at least {MACRO_F1})" if model else last_words(said)


def nccl():
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    except OSError as error:
        found("NCCL", "failed", f"{error}: put the folder of libnccl.so.2 into LD_LIBRARY_PATH")
        return
    number = (version.value // 10000, version.value // 100 % 100, version.value % 100)
    name = "NCCL " + ".".join(map(str, number))
    group(f"{name}, one rank", 1, conforms)
    if number >= TWO_RANKS_SINCE:
        group("two ranks on one card", 2, conforms, **TWO_RANKS)
        group("two ranks on one card train", 2, train_by_two, **TWO_RANKS)
    else:
        since = ".".join(map(str, TWO_RANKS_SINCE))
        found("two ranks on one card", "not run", f"{name} refuses them, {since} and later do not")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("stage", choices=["tests", "train", "nccl"])
parser.add_argument("--binaries", type=Path, required=True, help="the folder that ci/build-cuda.sh made")
parser.add_argument("--lines", required=True, help="the file that lines are added to")
parser.add_argument("--quick", action="store_true")
parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
arguments = parser.parse_args()
{"tests": tests, "train": train, "nccl": nccl}[arguments.stage]()
sys.exit(1 if "failed" in results else 3 if set(results) == {"skipped"} else 0)
