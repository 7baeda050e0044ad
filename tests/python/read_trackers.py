"""usage: read_trackers.py DIR: what TensorBoard and W&B read in a model's folder of a run, by their own packages.

Prints one JSON object. tensorboard: `scalars` (tag -> list of [step, value, wall time]) and `config` (the texts).
wandb (null where there is none): `run` (the fields and the config), `history` (the rows), `summary`, `exit` (the code,
or null) and `numbers` (those of the records).
"""

import json
import sys
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


def wandb():
    files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    if not files:
        return None
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore
    (file,) = files
    store = DataStore()
    store.open_for_scan(str(file))
    values = lambda items: {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
    run, history, summary, code, numbers = None, [], {}, None, []
    while (data := store.scan_data()) is not None:
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
