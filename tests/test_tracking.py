"""Who watches a run, and the agreement on its folder."""

from __future__ import annotations

import importlib
import io
import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from launcher import run_dir, versions
from launcher.cluster import command, devices
from launcher.config import store
from launcher.distributed import agree
from launcher.errors import UserError
from launcher.tracking import trackers
from launcher.tracking.console import Progress
from launcher.tracking.jsonl import MetricsFile
from launcher.tracking.plot import draw_loss
from launcher.tracking.trackers import Tracker
from tests.config.test_schema import composed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, **more: float) -> dict[str, Any]:
    figures = {"learning_rate": 1e-4, "tokens_per_second": 99.0, "data_wait": 0.1}
    return {"step": step, "loss": 2.5, **figures, **more}


def watched(console: io.StringIO) -> str:
    progress = Progress(console)
    progress.start(0, 3)
    for step in (1, 2, 3):
        progress.log([record(step)])
    progress.log([{"step": 3, "eval_loss": 1.25}])
    progress.finish()
    return console.getvalue()


def test_a_terminal_gets_a_bar_with_loss_rate_and_time_left() -> None:
    text = watched(Terminal())
    assert "3/3" in text
    assert "loss 2.5000" in text
    assert "99 tokens/s" in text
    assert "step 3: eval_loss 1.2500" in text


def test_elsewhere_plain_lines() -> None:
    text = watched(io.StringIO())
    assert "\r" not in text
    assert "step 3/3  loss 2.5000  rate 1.00e-04  99 tokens/s  0 s left" in text


def test_mfu_where_it_is_known_and_a_word_where_data_is_waited_for() -> None:
    console = io.StringIO()
    progress = Progress(console)
    progress.start(0, 1)
    progress.log([record(1, mfu=0.4123, data_wait=0.25)])
    (line,) = console.getvalue().splitlines()
    assert "99 tokens/s  MFU 41.2%  waits for data 25%  0 s left" in line


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    lines = [json.dumps(record(step)) for step in range(1, 9)]
    lines.append(json.dumps({"step": 8, "eval_loss": 2.0}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_unnamed_runs_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = store.build(composed())
    made = [run_dir.attempt(config, ["x"], 1)[0].path for _ in range(3)]
    assert len(set(made)) == 3
    assert {path.parent for path in made} == {tmp_path / "runs"}
    named = store.build({**composed(), "run_dir": str(made[0])})
    with pytest.raises(UserError, match="cannot be made: File exists"):
        run_dir.attempt(named, ["x"], 1)


def agreement(
    world: int, prints: list[str], create: Any, monkeypatch: pytest.MonkeyPatch
) -> list[Path | str]:
    """What each rank gets: the folder, or the sentence with which it refuses."""
    monkeypatch.setattr(agree, "PATIENCE", timedelta(seconds=2))
    store_, results = dist.HashStore(), [Path()] * world

    def rank_of(rank: int) -> None:
        try:
            results[rank] = agree.agree_on_run(store_, rank, world, prints[rank], create)
        except UserError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(len(prints))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_ranks_agree_on_the_folder_that_rank_0_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    results = agreement(
        3, ["a"] * 3, lambda: made.append(1) or run_dir.RunDir(tmp_path), monkeypatch
    )
    assert results == [run_dir.RunDir(tmp_path)] * 3
    assert made == [1]


def test_one_that_differs_refuses_all_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    results = agreement(
        3, ["a", "a", "b"], lambda: made.append(1) or run_dir.RunDir(tmp_path), monkeypatch
    )
    assert len(set(results)) == 1
    assert "rank 2 composed another configuration than rank 0" in str(results[0])
    assert not made


def test_a_folder_that_cannot_be_made_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def create() -> run_dir.RunDir:
        raise UserError("no room")

    assert agreement(2, ["a", "a"], create, monkeypatch) == ["no room"] * 2


def test_a_folder_that_others_cannot_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    results = agreement(2, ["a", "a"], lambda: run_dir.RunDir(Path("/not/shared")), monkeypatch)
    assert "every machine shares" in str(results[1])


def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (result, _) = agreement(2, ["a"], lambda: run_dir.RunDir(Path()), monkeypatch)
    assert "no word from rank 1" in str(result)


def test_versions_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.difference() is None, "the tests run on the tested versions"
    monkeypatch.setattr(versions, "tested", lambda: {**dict.fromkeys(versions.CHECKED, "0.1")})
    assert "torch 2.13" in (versions.difference() or "")


@pytest.mark.parametrize(("listed", "count"), [("0,1,3", 3), ("", 0), ("-1", 0), ("GPU-1a2b", 1)])
def test_visible_gpus_are_counted_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, listed: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert devices.visible_gpus() == count


def test_flash_attention_is_found_by_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    (tmp_path / "flash_attn").mkdir()  # version 4 brings such a folder too
    assert not devices.has_flash_attention()
    installed = tmp_path / "flash_attn-2.8.3.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: flash-attn\nVersion: 2.8.3\n")
    importlib.invalidate_caches()
    assert devices.has_flash_attention()


def test_liger_is_its_package_and_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name in ("liger_kernel", "triton"):
        assert not devices.has_liger()
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError  # nothing is imported")
        importlib.invalidate_caches()
    assert devices.has_liger()


@pytest.mark.parametrize(("value", "interprets"), [(None, False), ("0", False), ("1", True)])
def test_triton_is_interpreted_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, value: str | None, interprets: bool
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert devices.interprets_triton() is interprets


def test_cores_are_shared_among_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert command.environment(2, gpus=0)["OMP_NUM_THREADS"] == "4"
    assert command.environment(16, gpus=0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert command.environment(2, gpus=0)["OMP_NUM_THREADS"] == "3"


def test_the_command_keeps_odd_paths_whole() -> None:
    argv = command.torchrun(Path("/runs/a b;c"), 1, 2)
    assert argv[-4:] == ["-m", "launcher.worker", "/runs/a b;c", "1"]


def tracked_run(folder: Path, config: Any = None) -> run_dir.RunDir:
    run = run_dir.RunDir(folder)
    run.logs.mkdir(parents=True)
    run.config.write_text(store.dump(store.build(config or composed())))
    return run


def told(run: run_dir.RunDir, name: str, done: int, records: list[dict[str, Any]]) -> None:
    """One attempt as rank 0 has it: `records` after step `done`."""
    tracker = Tracker(name, "house", run, io.StringIO())
    lines = MetricsFile(run.metrics, run.logs / "lost-metrics.jsonl", run.steps)
    for observer in (lines, tracker):
        observer.start(done, 9)
        observer.log(records)
        observer.finish()
    assert tracker._alive


def scalars(run: run_dir.RunDir) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard would show them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.path / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def wandb_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format behind a header of 7 bytes: blocks of 32 KiB; in them parts of records,
    each with 4 bytes of checksum, 2 of length and 1 that says whether it is whole (1), the first
    (2), another (3) or the last (4)."""
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


def in_wandb(run: run_dir.RunDir) -> dict[str, list[tuple[int, float]]]:
    """The history of all its offline runs, which are to be one."""
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


def in_mlflow(run: run_dir.RunDir) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path}/mlruns/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'house'")
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.data.params["optimizer.learning_rate"] == "0.0001"
    return {
        key: [(each.step, each.value) for each in client.get_metric_history(only.info.run_id, key)]
        for key in only.data.metrics
    }


READ = {"tensorboard": scalars, "wandb": in_wandb, "mlflow": in_mlflow}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", list(READ))
@pytest.mark.usefixtures("offline")
def test_a_tracker_shows_every_step_once_though_some_are_done_again(
    name: str, tmp_path: Path
) -> None:
    """The second attempt goes on from step 2, and the first came to 4."""
    pytest.importorskip(name)
    run = tracked_run(tmp_path / "a run")
    evaluation = {"step": 2, "eval_loss": 2.25}
    told(run, name, 0, [record(1), record(2), evaluation, record(3), record(4)])
    told(run_dir.RunDir(run.path, 1), name, 2, [record(3), record(4), record(5)])
    found = READ[name](run)
    assert found["loss"] == [(step, 2.5) for step in (1, 2, 3, 4, 5)]
    assert found["eval_loss"] == [(2, 2.25)]
    assert "time" not in found


@pytest.mark.usefixtures("offline")
def test_the_configuration_goes_along_once(tmp_path: Path) -> None:
    run = tracked_run(tmp_path / "run")
    for done in (0, 1):
        told(run, "tensorboard", done, [record(done + 1)])
    (file,) = (run.path / "tensorboard").glob("*/hparams.yml")
    written = yaml.safe_load(file.read_text())
    settings = store.leaves(store.load(run.config))
    assert written.keys() == settings.keys()
    assert written["optimizer.learning_rate"] == settings["optimizer.learning_rate"]


class Gone:
    """A tracker whose server goes away."""

    calls = 0

    def start(self) -> None: ...
    def store_init_configuration(self, values: dict[str, Any]) -> None: ...
    def finish(self) -> None: ...
    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls += 1
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_says_so_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, console = Gone(), io.StringIO()
    monkeypatch.setitem(trackers.OPEN, "tensorboard", lambda *_: gone)
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
