"""Python's onnxruntime on the form that Optimum exports: batches of 8 as the rows come, every optimization, one run at
a time on all threads.
"""

import time

import numpy
import onnxruntime
from tokenizers import Tokenizer

from contestant import data, finish, parse, peers, read

arguments = parse(__doc__, ["infer-bbc"]).parse_args()
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
options.intra_op_num_threads = arguments.threads
session = onnxruntime.InferenceSession(peers / "minilm-optimum/model.onnx", options, ["CPUExecutionProvider"])

texts, labels = read(arguments.data or data / "bbc-split/test.csv", arguments.documents)
tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
tokenizer.enable_truncation(arguments.max_length)
tokenizer.no_padding()
ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
batches = [range(start, min(start + 8, len(ids))) for start in range(0, len(ids), 8)]


def run(batches):
    losses = []
    for batch in batches:
        shape = len(batch), max(len(ids[i]) for i in batch)
        inputs = {name: numpy.zeros(shape, numpy.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        for row, i in enumerate(batch):
            inputs["input_ids"][row, : len(ids[i])] = ids[i]
            inputs["attention_mask"][row, : len(ids[i])] = 1
        logits = session.run(["logits"], inputs)[0].astype(numpy.float64)
        log_sum = numpy.log(numpy.exp(logits).sum(1))
        losses += [log_sum[row] - logits[row, labels[i]] for row, i in enumerate(batch)]
    return sum(losses) / max(len(losses), 1)


run(batches[: arguments.warmup])
seconds = []
for _ in range(arguments.steps):
    started = time.perf_counter()
    loss = run(batches)
    seconds.append(time.perf_counter() - started)
examples, tokens = len(ids) * arguments.steps, sum(map(len, ids)) * arguments.steps
finish("onnxruntime", arguments, seconds, {"onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__},
       ["Optimum's form, opset 17", "batches of 8 as they come"], loss=loss,
       examples_per_second=examples / sum(seconds), tokens_per_second=tokens / sum(seconds))  # fmt: skip
