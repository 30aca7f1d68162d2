"""TensorBoard, Weights & Biases and MLflow, through accelerate.tracking."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from io import TextIOBase
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

from launcher import manifest
from launcher.config import store
from launcher.metrics import Record
from launcher.run_dir import RunDir

# Rank 0 talks to a server while the other ranks wait, and the server may be gone.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class Tracker:
    """Hands every number of every record to one tracker, under the names of metrics.jsonl.

    An error of a tracker does not end the training: it is said once, and the tracker gets nothing
    more in this attempt. What it misses stands in metrics.jsonl.
    """

    def __init__(self, name: str, project: str, run: RunDir, console: TextIOBase) -> None:
        self.name, self.project, self.run, self.console = name, project, run, console
        self._seen = _told_before(run)  # before metrics.jsonl is cut back to the checkpoint
        self._alive = True

    def start(self, done_steps: int, total_steps: int) -> None:
        self._try(self._open, done_steps)

    def log(self, records: list[Record]) -> None:
        self._try(self._log, records)

    def finish(self) -> None:
        self._try(lambda: self._tracker.finish())

    def _open(self, done_steps: int) -> None:
        PartialState()  # accelerate asks it who is rank 0; it joins the process group that stands
        known = _ids(self.run)
        self._tracker = OPEN[self.name](self, known.get(self.name), done_steps)
        self._tracker.start()
        if self.name not in known:
            settings = store.leaves(store.load(self.run.config))
            self._tracker.store_init_configuration({k: _plain(v) for k, v in settings.items()})
            manifest.write_json(self.run.trackers, {**known, self.name: self._id()})

    def _log(self, records: list[Record]) -> None:
        for record in records:
            if _key(record) not in self._seen:
                figures = {k: v for k, v in record.items() if k not in ("step", "time")}
                self._tracker.log(figures, step=record["step"])

    def _id(self) -> str:
        """By which the library finds this run again."""
        if self.name == "tensorboard":
            return "tensorboard"  # its folder
        tracked: Any = self._tracker.tracker
        return str(tracked.id if self.name == "wandb" else tracked.info.run_id)

    def _try(self, call: Callable[..., None], *args: Any) -> None:
        if not self._alive:
            return
        try:
            call(*args)
        except Exception as error:  # of any library, in any place
            self._alive = False
            sentence = (
                f"tracking.trackers: {self.name} failed and gets nothing more in this attempt "
                f"({type(error).__name__}: {error}); metrics.jsonl has it all"
            )
            print(sentence, file=sys.stderr, flush=True)  # the log of rank 0
            print(sentence, file=self.console, flush=True)

    def tensorboard(self, id: str | None, done_steps: int) -> TensorBoardTracker:
        # What an attempt wrote after the step that is gone on from is no longer shown.
        self._seen = set()
        return TensorBoardTracker("tensorboard", self.run.path, purge_step=done_steps + 1)

    def wandb(self, id: str | None, done_steps: int) -> WandBTracker:
        place = {} if "WANDB_DIR" in os.environ else {"dir": str(self.run.path)}
        again = {} if id is None else {"id": id}
        name = self.run.path.name
        return WandBTracker(self.project, name=name, resume="allow", **place, **again)

    def mlflow(self, id: str | None, done_steps: int) -> MLflowTracker:
        for key, value in PATIENCE.items():
            os.environ.setdefault(key, value)
        artifacts = None  # where the user's server puts them
        if "MLFLOW_TRACKING_URI" not in os.environ:
            folder = self.run.path / "mlruns"
            folder.mkdir(exist_ok=True)
            # Not plain files, which MLflow refuses since version 3.
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
            artifacts = (folder / "artifacts").as_uri()
        return MLflowTracker(self.project, artifacts, id, run_name=self.run.path.name)


OPEN = {"tensorboard": Tracker.tensorboard, "wandb": Tracker.wandb, "mlflow": Tracker.mlflow}


def _ids(run: RunDir) -> dict[str, str]:
    """Tracker → the id of its run, of those that earlier attempts have begun."""
    if not run.trackers.is_file():
        return {}
    found: dict[str, str] = json.loads(run.trackers.read_text(encoding="utf-8"))
    return found


def _told_before(run: RunDir) -> set[tuple[int, bool]]:
    """What earlier attempts have logged; wandb and mlflow keep it though its steps are repeated."""
    files = [run.metrics, *run.path.glob("logs/*/lost-metrics.jsonl")]
    lines = [line for file in files if file.is_file() for line in file.open(encoding="utf-8")]
    return {_key(json.loads(line)) for line in lines if line.endswith("}\n")}


def _key(record: Record) -> tuple[int, bool]:
    return record["step"], "eval_loss" in record


def _plain(value: Any) -> Any:
    """A setting as trackers take it."""
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
