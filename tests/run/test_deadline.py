"""A run stops early enough before its time limit to finish two steps and a save."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launcher.folders.run import RunDir
from launcher.run import deadline
from launcher.run.deadline import Deadline
from launcher.run.stop import StopRequest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_three_times_the_longest_step_must_remain(clock: list[float]) -> None:
    limit = Deadline(1000.0 + 120)
    for seconds in (0, 5, 20, 5):
        clock[0] += seconds
        assert not limit.is_near()  # at 1030: 90 s left, 3 × 20 + 10 s needed
    clock[0] += 19
    assert not limit.is_near()  # 71 left
    clock[0] += 2
    assert limit.is_near()


def test_without_a_limit_the_deadline_never_comes(clock: list[float]) -> None:
    assert not Deadline(None).is_near()


def test_the_stop_reason_is_the_time_limit(tmp_path: Path, clock: list[float]) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir(parents=True)
    run.job.write_text(json.dumps({"end": 1000.0 + deadline.SPARE_SECONDS - 1}))
    stop = StopRequest(run)
    assert stop.requested()
    assert stop.reason() == "time limit"
    assert Deadline.from_job_file(tmp_path / "none.json") is None


@pytest.mark.parametrize("content", ["", "{}", '{"end": "soon"}', '{"end": NaN}', "[1]"])
def test_without_a_readable_file_the_signal_of_slurm_stops_the_run(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.json").write_text(content)
    limit = Deadline.from_job_file(tmp_path / "job.json")
    assert limit is not None, "Slurm signals more than once: later signals do not end the process"
    assert not limit.is_near()
    assert "job.json" in capsys.readouterr().err
