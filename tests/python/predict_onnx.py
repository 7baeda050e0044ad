"""usage: predict_onnx.py MODEL.onnx IDS_JSON: the file through onnx.checker and Python's onnxruntime.

IDS_JSON is as for load_model.py; each sequence goes through alone, with a mask of ones and token types of zero where
the model asks for them and the row names none. Prints JSON: logits (a list a sequence), inputs and outputs
(name -> shape, symbolic axes by name), opset, metadata.
"""

import json
import sys

import numpy as np
import onnx
import onnxruntime

model, path = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    sequences = [row if isinstance(row, dict) else {"input_ids": row} for row in json.load(file)]

onnx.checker.check_model(model, full_check=True)
proto = onnx.load(model, load_external_data=False)

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
wanted = [given.name for given in session.get_inputs()]


def feed(row):
    ones = np.ones((1, len(row["input_ids"])), np.int64)
    row = {"attention_mask": ones[0], "token_type_ids": 0 * ones[0], **row}
    return {name: np.asarray([row[name]], np.int64) for name in wanted}


print(json.dumps({
    "logits": [session.run(["logits"], feed(row))[0][0].tolist() for row in sequences],
    "inputs": {given.name: given.shape for given in session.get_inputs()},
    "outputs": {given.name: given.shape for given in session.get_outputs()},
    "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
    "metadata": {entry.key: entry.value for entry in proto.metadata_props},
}))  # fmt: skip
