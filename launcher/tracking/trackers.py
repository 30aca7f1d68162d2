"""TensorBoard, Weights & Biases and MLflow, through accelerate.tracking."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from io import TextIOBase
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from launcher.config import store
from launcher.folders import manifest
from launcher.folders.json_file import DamagedFile, read_object
from launcher.folders.run import RunDir
from launcher.run.metrics import parse_record
from launcher.tracking.base import Record

# The other ranks wait while rank 0 sends to a server, which may be unreachable.
MLFLOW_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class Tracker:
    """Sends all numbers of all records to one tracker, under their names in metrics.jsonl.

    An error of a tracker does not end training: it is reported once, and the tracker receives
    nothing more in this attempt. metrics.jsonl has the missing records.
    """

    def __init__(self, name: str, project: str, run: RunDir, console: TextIOBase) -> None:
        self.name, self.project, self.run, self.console = name, project, run, console
        self._logged: set[tuple[int, bool]] = set()
        self._alive = True

    def start(self, done_steps: int, total_steps: int) -> None:
        self._try(self._open, done_steps)

    def log(self, records: list[Record]) -> None:
        self._try(self._log, records)

    def finish(self) -> None:
        self._try(lambda: self._tracker.finish())

    def _open(self, done_steps: int) -> None:
        self._logged = _logged_after(self.run, done_steps)
        PartialState()  # by which accelerate finds rank 0; uses the existing process group
        run_ids = _read_run_ids(self.run, self._say)
        run_id = run_ids.get(self.name)
        self._tracker: GeneralTracker = OPENERS[self.name](self, run_id, done_steps)
        self._tracker.start()
        if run_id is None:
            settings = store.leaves(store.load(self.run.config))
            self._tracker.store_init_configuration({k: _to_scalar(v) for k, v in settings.items()})
            manifest.write_json(self.run.trackers, {**run_ids, self.name: self._run_id()})

    def _log(self, records: list[Record]) -> None:
        for record in records:
            if _key(record) not in self._logged:
                metrics = {k: v for k, v in record.items() if k not in ("step", "time")}
                self._tracker.log(metrics, step=record["step"])

    def _run_id(self) -> str:
        """The id by which the library finds this run again."""
        if self.name == "tensorboard":
            return "tensorboard"  # its folder
        library_run: Any = self._tracker.tracker
        return str(library_run.id if self.name == "wandb" else library_run.info.run_id)

    def _try(self, call: Callable[..., None], *args: Any) -> None:
        if not self._alive:
            return
        try:
            call(*args)
        except Exception as error:  # the libraries raise errors of many types
            self._alive = False
            self._say(
                f"tracking.trackers: {self.name} failed and receives nothing more in this attempt "
                f"({type(error).__name__}: {error}); metrics.jsonl has all records"
            )

    def _say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)  # the log of rank 0
        print(message, file=self.console, flush=True)

    def open_tensorboard(self, run_id: str | None, done_steps: int) -> TensorBoardTracker:
        """Steps that an earlier attempt wrote after `done_steps` are no longer shown."""
        self._logged = set()
        folder = self.run.inside("tensorboard")
        return TensorBoardTracker(folder.name, folder.parent, purge_step=done_steps + 1)

    def open_wandb(self, run_id: str | None, done_steps: int) -> WandBTracker:
        """Resumes the run `run_id` if there is one."""
        folder = {} if "WANDB_DIR" in os.environ else {"dir": str(self.run.inside("wandb").parent)}
        existing = {} if run_id is None else {"id": run_id}
        name = self.run.path.name
        return WandBTracker(self.project, name=name, resume="allow", **folder, **existing)

    def open_mlflow(self, run_id: str | None, done_steps: int) -> MLflowTracker:
        """Resumes the run `run_id` if there is one. Without a server, MLflow writes to the run
        folder."""
        for key, value in MLFLOW_LIMITS.items():
            os.environ.setdefault(key, value)
        artifacts = None  # the user's server has its own place for them
        if "MLFLOW_TRACKING_URI" not in os.environ:
            folder = self.run.inside("mlruns")
            folder.mkdir(exist_ok=True)
            # MLflow 3 no longer accepts plain files.
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
            artifacts = (folder / "artifacts").as_uri()
        return MLflowTracker(self.project, artifacts, run_id, run_name=self.run.path.name)


OPENERS: dict[str, Callable[[Tracker, str | None, int], GeneralTracker]] = {
    "tensorboard": Tracker.open_tensorboard,
    "wandb": Tracker.open_wandb,
    "mlflow": Tracker.open_mlflow,
}


def _read_run_ids(run: RunDir, say: Callable[[str], None]) -> dict[str, str]:
    """Tracker → the id of its run, for the trackers that earlier attempts started."""
    if not run.trackers.is_file():
        return {}
    try:
        return {name: str(run_id) for name, run_id in read_object(run.trackers).items()}
    except DamagedFile as error:
        say(f"{error}; the trackers start new runs")
        return {}


def _logged_after(run: RunDir, done_steps: int) -> set[tuple[int, bool]]:
    """The records of earlier attempts about steps that are repeated. wandb and mlflow keep them."""
    logged = set()
    lost = run.path.glob("logs/*/lost-metrics.jsonl")
    for file in [run.metrics, *(run.inside(str(each.relative_to(run.path))) for each in lost)]:
        if file.is_file():
            with file.open("rb") as lines:
                records = filter(None, map(parse_record, lines))
                logged |= {_key(record) for record in records if record["step"] > done_steps}
    return logged


def _key(record: Record) -> tuple[int, bool]:
    return record["step"], "eval_loss" in record


def _to_scalar(value: Any) -> Any:
    """A setting in a type that all trackers accept."""
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
