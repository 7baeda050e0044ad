"""usage: read_trackers.py DIR: what a model's folder of a run holds for TensorBoard, by its own reader, and for W&B, by
its own protobuf.

Prints one JSON object. tensorboard: `scalars` (tag -> list of [step, value, wall time]) and `config` (the texts).
wandb (null where there is none): `run` (the fields and the config), `history` (the rows), `summary`, `exit` (the code,
or null) and `numbers` (those of the records).
"""

import json
import struct
import sys
import zlib
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

folder = Path(sys.argv[1])


def tensorboard():
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    points = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    texts = [event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors("config")]
    return {
        "scalars": {tag: [[p.step, p.value, p.wall_time] for p in list] for tag, list in points.items()},
        "config": texts,
    }


def records(data):
    """The records of LevelDB's log format; W&B's own reader is in Go, and `wandb sync` tries it in sync_wandb.py."""
    assert data[:7] == struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
    at, record = 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + piece) == crc and len(piece) == length
        at += 7 + length
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            yield record


def wandb():
    files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    if not files:
        return None
    from wandb.proto import wandb_internal_pb2

    (file,) = files
    values = lambda items: {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
    run, history, summary, code, numbers = None, [], {}, None, []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        numbers.append(record.num)
        match record.WhichOneof("record_type"):
            case "run":
                config = values(record.run.config.update)
                record.run.ClearField("config")
                run = MessageToDict(record.run, preserving_proto_field_name=True) | {"config": config}
            case "history":
                history.append({"step": record.history.step.num, **values(record.history.item)})
            case "summary":
                summary |= values(record.summary.update)
            case "exit":
                code = record.exit.exit_code
            case "header":
                assert record.header.version_info.producer
            case other:
                raise ValueError(f"a record of kind {other}")
    return {"run": run, "history": history, "summary": summary, "exit": code, "numbers": numbers}


print(json.dumps({"tensorboard": tensorboard(), "wandb": wandb()}))
