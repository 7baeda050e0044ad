"""Measures kiln beside transformers + Accelerate on one GPU, in turns: a line of JSON for each turn.

Weights and texts are made once, by peer.py, and both read them. kiln is a process for each turn, as it is a command;
the others are processes that wait meanwhile, so that they load and compile once.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

here = Path(__file__).resolve().parent
WARMUP = 5  # steps of each turn that do not count
VARIANTS = ["eager, autocast", "eager, bf16 weights", "compiled, autocast", "compiled, bf16 weights"]


@dataclass(frozen=True)
class Workload:
    title: str
    model: str
    batch: int
    length: int | None  # tokens of each row; None: drawn, at most 512
    steps: int
    ratio: float | None = None  # what kiln aims at: so many times the best of the others' speed,
    share: float | None = None  # and this share of the peak


WORKLOADS = {
    "base-128": Workload("BERT-base, 128 × 128 tokens", "bert-base", 128, 128, 30, 1.0, 0.3),
    "base-512": Workload("BERT-base, 32 × 512 tokens", "bert-base", 32, 512, 30),
    "large-384": Workload("BERT-large, 32 × 384 tokens", "bert-large", 32, 384, 15),
    "real-lengths": Workload("BERT-base, 32 rows of real lengths", "bert-base", 32, None, 60, 1.5),
}
TINY = Workload("a tiny BERT, 4 × 16 tokens, on the CPU", "bert-tiny", 4, 16, 3)
# hidden_size, num_hidden_layers, num_attention_heads, intermediate_size
SHAPES = {"bert-base": (768, 12, 12, 3072), "bert-large": (1024, 24, 16, 4096), "bert-tiny": (64, 2, 2, 128)}


def emit(path, **line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def flops(model, lengths):
    """Operations of the matrix products of a training step, forward and backward, on rows of these lengths."""
    hidden, layers, _, intermediate = SHAPES[model]
    row = lambda n: layers * n * (8 * hidden**2 + 4 * hidden * intermediate + 4 * n * hidden) + 2 * hidden**2
    return 3 * sum(row(n) for n in lengths)


class Memory:
    """The most memory of the first GPU that was taken within the `with`, beyond what was when it began."""

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    def __init__(self):
        self.device, self.bytes, self.nvml = ctypes.c_void_p(), None, None
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")  # it comes with the driver
        except OSError as error:
            return print(f"memory is not measured: {error}", file=sys.stderr)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.device)) == 0:
            self.nvml = nvml
        else:
            print("memory is not measured: NVML does not open GPU 0", file=sys.stderr)

    def used(self):
        info = self.Info()
        self.nvml.nvmlDeviceGetMemoryInfo(self.device, ctypes.byref(info))
        return info.used

    def watch(self):
        while not self.done.wait(0.01):
            self.bytes = max(self.bytes, self.used() - self.before)

    def __enter__(self):
        if self.nvml:
            self.before, self.bytes, self.done = self.used(), 0, threading.Event()
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()

    def __exit__(self, *_):
        if self.nvml:
            self.done.set()
            self.thread.join()


class Peer:
    """A process of peer.py: it answers `build`, then `turn` as often as it is asked."""

    def __init__(self, workload, variant):
        command = [sys.executable, here / "peer.py", workload, variant]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, word):
        try:
            print(word, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it ended: there is no answer either
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"it ended with status {self.process.wait()}; its last words stand above")


def kiln(arguments, name, workload):
    """A turn of kiln, as peer.py's answer is."""
    data = data_folder()
    cuda = [] if name == "tiny" else ["--set", "train.device=cuda", "--set", "train.dtype=bf16"]
    command = [arguments.kiln, "bench", data / f"{name}.toml", "--root", data / "runs", *cuda, "--world-sizes", "1"]
    command += ["--warmup", WARMUP, "--steps", workload.steps, "--json", "--quiet", "--offline"]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"kiln bench ended with status {run.returncode}: {' '.join(run.stderr.split())[-300:]}")
    steps = json.loads(run.stdout)["worlds"][0]["steps"]
    total = lambda key: sum(step[key] for step in steps)
    return {"seconds": total("seconds"), "tokens": total("tokens"), "rows": total("sequences"), "flops": total("flops")}


def data_folder():
    return Path(os.environ.get("KILN_CACHE") or Path.home() / ".cache/kiln") / "data/gpu"


def measure(arguments):
    name = arguments.workload
    workload = WORKLOADS.get(name, TINY)
    memory, taken, peaks, tokens, failed = Memory(), {}, [], {}, []
    peers = {variant: Peer(name, variant) for variant in arguments.variants.split(";")}  # they load libraries meanwhile

    def turn(contestant):
        if contestant == "kiln":
            with memory:
                answer = kiln(arguments, name, workload)
            taken["kiln"] = memory.bytes
            return answer
        if contestant not in taken:
            with memory:
                peaks.append(peers[contestant].ask("build")["peak_flops"])
            taken[contestant] = memory.bytes
        return peers[contestant].ask("turn")

    first, *others = peers  # the first makes what kiln reads, too; compiling, which takes longest, comes last
    order = [first, "kiln", *others]
    for number in range(1, arguments.rounds + 1):
        for contestant in order[:: 1 if number % 2 else -1]:
            if contestant in failed:
                continue
            print(f"{name}: round {number}: {contestant}", file=sys.stderr, flush=True)
            try:
                line = {"round": number} | turn(contestant)
                tokens[contestant] = line["tokens"]
                line |= {"peak_flops": max(peaks, default=0), "peak_memory_bytes": taken[contestant]}
            except (RuntimeError, OSError, ValueError, LookupError) as error:
                failed.append(contestant)
                line = {"error": str(error)}
                print(f"{name}: {contestant}: {error}", file=sys.stderr, flush=True)
            emit(arguments.lines, workload=name, contestant=contestant, **line)
    for peer in peers.values():
        peer.process.kill()
    if len(set(tokens.values())) > 1:
        failed.append("kiln")
        error = f"they trained on unequal numbers of tokens: {tokens}"
        emit(arguments.lines, workload=name, contestant="all", error=error)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=[*WORKLOADS, "tiny"])
    parser.add_argument("--kiln", required=True, help="the program")
    parser.add_argument("--lines", required=True, help="the file that lines are added to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", default=";".join(VARIANTS), help="with ; between them [default: %(default)s]")
    sys.exit(measure(parser.parse_args()))
