"""transformers' fast tokenizer through datasets.map into an Arrow file, as examples of fine-tuning do it.

--processes N maps in N processes of one thread each, --processes 0 in this one with the tokenizer's own threads.
What is timed is the call of map, which starts the processes; `mapping_rows_per_second` leaves their start out.
"""

import os
import tempfile
import time
from pathlib import Path

from contestant import finish, parse, peers

parser = parse(__doc__, ["encode-bbc"])
parser.add_argument("--processes", type=int, help="default: as many as --threads")
arguments = parser.parse_args()
processes = arguments.threads if arguments.processes is None else arguments.processes
os.environ["TOKENIZERS_PARALLELISM"] = "false" if processes else "true"
os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)

import datasets  # after the environment, which its libraries read once
import pyarrow.compute
import tokenizers
from transformers import AutoTokenizer

datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)

with tempfile.TemporaryDirectory() as folder:
    source = arguments.data or peers / "bbc-repeated.csv"
    rows = datasets.Dataset.from_csv(str(source), cache_dir=folder)
    size = pyarrow.compute.sum(pyarrow.compute.binary_length(rows.data.column("text"))).as_py()
    stamps = Path(folder) / "stamps"
    max_length = arguments.max_length

    def encode(batch):
        started = time.monotonic()
        encoded = tokenizer(batch["text"], truncation=True, max_length=max_length)
        with open(f"{stamps}.{os.getpid()}", "a") as file:
            print(started, time.monotonic(), file=file)
        return encoded

    def run(rows):
        started = time.perf_counter()
        rows.map(
            encode, batched=True, remove_columns=["text"], num_proc=processes or None, load_from_cache_file=False,
            cache_file_name=f"{folder}/encoded.arrow",
        )  # fmt: skip
        seconds = time.perf_counter() - started
        times = [float(time) for file in Path(folder).glob("stamps.*") for time in file.read_text().split()]
        for file in Path(folder).glob("stamps.*"):
            file.unlink()
        return seconds, max(times) - min(times)

    for _ in range(arguments.warmup):
        run(rows.select(range(min(len(rows), 1000))))
    seconds, mapping = zip(*(run(rows) for _ in range(arguments.steps)))
    total = len(rows) * arguments.steps
    versions = {"datasets": datasets.__version__, "tokenizers": tokenizers.__version__}
    finish("datasets" if processes else "datasets, one process", arguments, list(seconds), versions,
           [f"num_proc={processes or None}"], rows_per_second=total / sum(seconds),
           megabytes_per_second=size * arguments.steps / sum(seconds) / 1e6,
           mapping_rows_per_second=total / sum(mapping))  # fmt: skip
