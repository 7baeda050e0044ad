"""usage: save_weights.py FOLDER: one small model's weights as each kind of checkpoint keeps them.

Makes FOLDER/{one,shards,pickle,pickles}: a safetensors file, several with an index, torch.save's file, and
several of those with an index. The tensors are of several dtypes and shapes, two share their storage, and one is a
transposed view.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

folder = Path(sys.argv[1])
torch.manual_seed(0)
base = torch.randn(40, 6)
tensors = {
    "f32": torch.randn(30, 7),
    "f16": torch.randn(5, 3).half(),
    "bf16": torch.randn(1, 9).bfloat16(),
    "f64": torch.randn(4).double(),
    "scalar": torch.tensor(3.5),
    "part": base[10:20],
    "other.part": base[20:],
}
alone = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
halves = list(tensors)[:3], list(tensors)[3:]

for name in ["one", "shards", "pickle", "pickles"]:
    (folder / name).mkdir()
save_file(alone, folder / "one/model.safetensors")
torch.save(tensors | {"transposed": torch.randn(3, 8).T}, folder / "pickle/pytorch_model.bin")
for kind, extension, save in [
    ("shards", "safetensors", lambda part, path: save_file({name: alone[name] for name in part}, path)),
    ("pickles", "bin", lambda part, path: torch.save({name: tensors[name] for name in part}, path)),
]:
    stem = "model" if extension == "safetensors" else "pytorch_model"
    weight_map = {}
    for i, part in enumerate(halves, 1):
        file = f"{stem}-{i:05}-of-00002.{extension}"
        save(part, folder / kind / file)
        weight_map |= {name: file for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / kind / f"{stem}.{extension}.index.json").write_text(json.dumps(index))
