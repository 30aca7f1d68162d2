"""TensorBoard, Weights & Biases and MLflow show each step once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import store
from launcher.folders.run import RunDir
from launcher.tracking import trackers
from launcher.tracking.jsonl import MetricsFile
from launcher.tracking.trackers import Tracker
from tests.helpers.compose import composed_raw
from tests.helpers.tracking import in_mlflow, in_wandb, record, scalars

READ = {"tensorboard": scalars, "wandb": in_wandb, "mlflow": in_mlflow}


def tracked_run(folder: Path, config: Any = None) -> RunDir:
    run = RunDir(folder)
    run.logs.mkdir(parents=True)
    run.config.write_text(store.dump(store.build(config or composed_raw())))
    return run


def told(run: RunDir, name: str, done: int, records: list[dict[str, Any]]) -> None:
    """One attempt on rank 0: `records` after step `done`."""
    tracker = Tracker(name, "house", run, io.StringIO())
    lines = MetricsFile(run.metrics, run.logs / "lost-metrics.jsonl", run.steps, io.StringIO())
    for observer in (lines, tracker):
        observer.start(done, 9)
        observer.log(records)
        observer.finish()
    assert tracker._alive


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", list(READ))
@pytest.mark.usefixtures("offline")
def test_a_tracker_shows_every_step_once_even_if_some_are_repeated(
    name: str, tmp_path: Path
) -> None:
    """The first attempt reached step 4, and the second resumes from step 2."""
    pytest.importorskip(name)
    run = tracked_run(tmp_path / "a run")
    evaluation = {"step": 2, "eval_loss": 2.25}
    told(run, name, 0, [record(1), record(2), evaluation, record(3), record(4)])
    told(RunDir(run.path, 1), name, 2, [record(3), record(4), record(5)])
    found = READ[name](run)
    assert found["loss"] == [(step, 2.5) for step in (1, 2, 3, 4, 5)]
    assert found["eval_loss"] == [(2, 2.25)]
    assert "time" not in found


@pytest.mark.usefixtures("offline")
def test_the_configuration_is_logged_once(tmp_path: Path) -> None:
    run = tracked_run(tmp_path / "run")
    for done in (0, 1):
        told(run, "tensorboard", done, [record(done + 1)])
    (file,) = (run.path / "tensorboard").glob("*/hparams.yml")
    written = yaml.safe_load(file.read_text())
    settings = store.leaves(store.load(run.config))
    assert written.keys() == settings.keys()
    assert written["optimizer.learning_rate"] == settings["optimizer.learning_rate"]


class Gone:
    """A tracker whose server becomes unavailable."""

    calls = 0

    def start(self) -> None: ...
    def store_init_configuration(self, values: dict[str, Any]) -> None: ...
    def finish(self) -> None: ...
    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls += 1
        raise ConnectionError("no route to host")


def test_a_failing_tracker_warns_once_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, console = Gone(), io.StringIO()
    monkeypatch.setitem(trackers.OPENERS, "tensorboard", lambda *_: gone)
    tracker = Tracker("tensorboard", "house", tracked_run(tmp_path / "run"), console)
    tracker.start(0, 3)
    for step in (1, 2, 3):
        tracker.log([record(step)])
    tracker.finish()
    assert gone.calls == 1
    log = capsys.readouterr().err
    assert log.count("tensorboard failed") == 1
    assert "ConnectionError: no route to host" in log
    assert console.getvalue() == log


@pytest.mark.parametrize("content", ["", "[]", "\0"])
def test_damaged_ids_are_named_and_a_new_run_is_started(tmp_path: Path, content: str) -> None:
    run = tracked_run(tmp_path / "run")
    run.trackers.write_text(content)
    run.metrics.write_text('nonsense\n{"step": 1, "loss": 2.0}\n')
    console = io.StringIO()
    tracker = Tracker("tensorboard", "house", run, console)
    tracker.start(1, 9)
    tracker.log([record(2)])
    tracker.finish()
    assert tracker._alive
    assert "trackers.json" in console.getvalue()
    assert "the trackers start new runs" in console.getvalue()
    assert scalars(run)["loss"] == [(2, 2.5)]
