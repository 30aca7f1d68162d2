"""What is read of metrics.jsonl: bounded, in the presence of damaged lines."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from launcher.run import curves, metrics
from launcher.run.curves import MAX_POINTS, Curve, RunMetrics
from launcher.run.metrics import Glance

BAD = ("nonsense", "[1]", "3", '{"loss": 1}', '{"step": "1"}', '{"step": 1.5}', '{"step": true}',
       '{"step": -1}', '{"step": null}', "[" * 9999, '{"step": 1', '{"step": 1}{"step": 2}',
       '{"step": 1' + "0" * 400 + "}")  # fmt: skip
ODD: list[dict[str, Any]] = [
    {"loss": None}, {"loss": "low"}, {"loss": float("nan")}, {"loss": float("inf")}, {"loss": []},
    {"loss": 10**400}, {"loss": True}, {"time": None}, {"tokens": "many"}, {"tokens_per_second": 0},
]  # fmt: skip


def line(step: int, **more: Any) -> str:
    record = {
        "step": step, "loss": 9.0 / step, "learning_rate": 0.1, "grad_norm": 1.0,
        "time": 2.0 * step, "tokens": 100 * step, "tokens_per_second": 50.0,
        "peak_memory_bytes": 10**9,
    }  # fmt: skip
    return json.dumps({**record, **more}) + "\n"


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(lines))
    return path


def long_file(path: Path, steps: int) -> Path:
    with path.open("w") as file:
        for step in range(1, steps + 1):
            file.write(line(step))
            if step % 1000 == 0:
                file.write(json.dumps({"step": step, "eval_loss": abs(step - 3000) + 1.5}) + "\n")
    return path


def test_the_end_of_a_file_and_its_best_evaluation_are_seen(tmp_path: Path) -> None:
    seen = Glance.of(long_file(tmp_path / "metrics.jsonl", 5000), steps=3)
    assert (seen.newest["step"], seen.newest["loss"]) == (5000, 9.0 / 5000)
    assert seen.pace == ((4998, 9996.0), (4999, 9998.0), (5000, 10_000.0))
    assert (seen.best_eval_loss, seen.is_damaged) == (1.5, False)


def test_a_file_that_ends_with_many_evaluations_still_has_a_newest_step(tmp_path: Path) -> None:
    evaluations = [json.dumps({"step": 1, "eval_loss": 2.0}) + "\n"] * 5000
    seen = Glance.of(write(tmp_path / "metrics.jsonl", [line(1), *evaluations]))
    assert (seen.newest["step"], seen.best_eval_loss) == (1, 2.0)


def test_without_a_file_nothing_is_seen(tmp_path: Path) -> None:
    assert Glance.of(tmp_path / "metrics.jsonl") == Glance()
    assert Glance.of(tmp_path).is_damaged, "a folder of that name"
    assert RunMetrics(tmp_path / "metrics.jsonl").update().points("loss") == []


@pytest.mark.parametrize("bad", BAD, ids=lambda text: text[:24])
def test_a_bad_line_is_counted_and_the_others_are_read(tmp_path: Path, bad: str) -> None:
    file = write(tmp_path / "metrics.jsonl", [line(1), line(2), bad + "\n", line(3), '{"step": 4'])
    seen, read = Glance.of(file), RunMetrics(file).update()
    assert (seen.newest["step"], seen.is_damaged) == (3, True)
    assert [step for step, _ in seen.pace] == [1, 2, 3]
    assert (read.count, read.bad_lines, read.newest["step"]) == (3, 1, 3)
    assert read.points("loss") == [(1, 9.0), (2, 4.5), (3, 3.0)]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_field_that_is_no_finite_number_is_left_out(tmp_path: Path, odd: dict[str, Any]) -> None:
    (name,) = odd
    file = write(tmp_path / "metrics.jsonl", [line(1), line(2, **odd), line(3)])
    seen, read = Glance.of(file), RunMetrics(file).update()
    assert (seen.newest["step"], seen.is_damaged, read.bad_lines) == (3, False, 0)
    steps = [1, 3] if name == "loss" else [1, 2, 3]
    assert [step for step, _ in read.points("loss")] == steps
    assert read.seconds_in_steps > 0


def test_fast_and_slow_reading_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "BLOCK_BYTES", 100_000)
    file = long_file(tmp_path / "metrics.jsonl", 20_000)
    fast = RunMetrics(file).update()
    monkeypatch.setattr(curves, "_fast_columns", lambda block: None)
    slow = RunMetrics(file).update()
    for read in (fast, slow):
        assert (read.count, read.bad_lines, read.best_eval_loss) == (20_020, 0, 1.5)
        assert read.newest["step"] == 20_000
        assert read.seconds_in_steps == pytest.approx(20_000 * 2)
    for name in curves.CURVES:
        assert fast.points(name) == slow.points(name)
        assert fast.smoothed(name) == slow.smoothed(name)
    assert fast.evaluations() == slow.evaluations()
    assert (fast.pace, fast.median_rate()) == (slow.pace, slow.median_rate())


def test_only_new_lines_are_read_and_a_replaced_file_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    read = RunMetrics(file)
    assert read.update().count == 0
    file.write_text(line(1) + line(2) + '{"ste')
    assert read.update().count == 2
    file.write_text(line(1) + line(2) + '{"step": 3, "loss": 1.0}\n')
    assert read.update().points("loss") == [(1, 9.0), (2, 4.5), (3, 1.0)]
    other = write(tmp_path / "other", [line(1)])  # written by a new attempt
    os.replace(other, file)
    assert (read.update().count, read.points("loss")) == (1, [(1, 9.0)])


def test_a_long_curve_keeps_its_extremes_and_its_last_point(tmp_path: Path) -> None:
    """Appended in pieces of many sizes, as it grows."""
    steps = curves.np.arange(1, 300_001)
    values = curves.np.sin(steps / 30_000)
    values[123_456], values[234_567] = 99.0, -99.0
    curve = Curve()
    at = 0
    for size in (1, 2, 700, 3, 50_000, 1, 99_999, 149_294):
        curve.extend(steps[at : at + size], values[at : at + size])
        at += size
    assert at == len(steps)
    points = curve.points()
    assert 500 < len(points) <= MAX_POINTS
    assert {(123_457, 99.0), (234_568, -99.0)} <= set(points)
    assert points[-1] == (300_000, float(values[-1]))
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert set(points) <= set(zip(steps.tolist(), values.tolist(), strict=True))


def test_the_moving_average_is_over_all_points(tmp_path: Path) -> None:
    """It does not depend on which points are kept."""
    file = write(tmp_path / "metrics.jsonl", [line(s, loss=float(s % 2)) for s in range(1, 10_001)])
    assert RunMetrics(file).update().smoothed("loss")[-1][1] == pytest.approx(4 / 9)


def test_long_runs_are_looked_at_in_bounded_memory(tmp_path: Path) -> None:
    """What is kept of a run does not grow with it."""
    kept, peaks = [], []
    for steps in (20_000, 60_000):
        file = long_file(tmp_path / "metrics.jsonl", steps)
        tracemalloc.start()
        read = RunMetrics(file).update()
        Glance.of(file)
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        kept.append(now)
        peaks.append(peak)
        assert len(read.points("loss")) <= MAX_POINTS
    assert max(kept) < 3_000_000, "so twenty runs keep less than 60 MB"
    assert max(peaks) < 60_000_000
    assert file.stat().st_size > metrics.MAX_TAIL_BYTES


def test_zeros_after_a_power_failure_hide_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "metrics.jsonl", [line(1), line(2)])
    os.truncate(file, 20 << 20)
    seen = Glance.of(file)
    assert (seen.newest["step"], seen.is_damaged) == (2, True)
    read = RunMetrics(file).update()
    assert (read.newest["step"], read.count) == (2, 2)
    assert read.bad_lines
    with file.open("a") as more:
        more.write("\n" + line(3))
    assert RunMetrics(file).update().newest["step"] == 3
    assert read.update().newest["step"] == 3
