"""Lines of metrics, and what trackers show for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from launcher.folders.run import RunDir


def record(step: int, **more: float) -> dict[str, Any]:
    figures = {"learning_rate": 1e-4, "tokens_per_second": 99.0, "data_wait": 0.1}
    return {"step": step, "loss": 2.5, **figures, **more}


def scalars(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard would show them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.path / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def wandb_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format after a header of 7 bytes: blocks of 32 KiB that contain parts of
    records. Each part starts with 4 bytes of checksum, 2 of length and 1 of type: a complete
    record (1), or its first (2), a middle (3) or its last part (4)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def in_wandb(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """The history of all its offline runs; there must be exactly one."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[tuple[int, float]]] = {}
    ids = set()
    for file in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(file.read_bytes()):
            read = Record()
            read.ParseFromString(data)
            ids |= {read.run.run_id} - {""}
            row = {(i.key or i.nested_key[0]): i.value_json for i in read.history.item}
            for key in row.keys() - {"_step", "_timestamp", "_runtime"}:
                found.setdefault(key, []).append((int(row["_step"]), json.loads(row[key])))
    assert len(ids) == 1
    return found


def in_mlflow(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path}/mlruns/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'house'")
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.data.params["optimizer.learning_rate"] == "0.0001"
    return {
        key: [(each.step, each.value) for each in client.get_metric_history(only.info.run_id, key)]
        for key in only.data.metrics
    }
