"""metrics.jsonl of a run that resumes: what is kept, what is moved, what is said."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from launcher.folders.run import RunDir
from launcher.tracking.jsonl import MetricsFile
from launcher.tracking.plot import draw_loss


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.logs.mkdir(parents=True)
    return run


def resume(run: RunDir, done_steps: int) -> str:
    """Start after `done_steps`; what the console shows."""
    console = io.StringIO()
    metrics = MetricsFile(run.metrics, run.logs / "lost-metrics.jsonl", run.steps, console)
    metrics.start(done_steps, 9)
    metrics.log([{"step": done_steps + 1, "loss": 0.5}])
    metrics.finish()
    return console.getvalue()


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": s, "loss": 1.0 / s}).encode() + b"\n" for s in steps)


def test_lines_of_lost_steps_and_bad_lines_are_moved_and_bad_ones_are_named(run: RunDir) -> None:
    bad = b'nonsense\n{"step": "2"}\n\xff\xfe\n[]\n\n'
    run.metrics.write_bytes(lines(1) + bad + lines(2, 3, 4))
    said = resume(run, 2)
    assert "metrics.jsonl: 5 lines are not records; moved to " in said
    assert run.metrics.read_bytes() == lines(1, 2) + b'{"step": 3, "loss": 0.5}\n'
    assert (run.logs / "lost-metrics.jsonl").read_bytes() == bad + lines(3, 4)
    assert json.loads(run.steps.read_text()) == {"total_steps": 9}


def test_an_incomplete_last_line_is_moved_without_a_word(run: RunDir) -> None:
    """The attempt was killed while it wrote."""
    run.metrics.write_bytes(lines(1) + b'{"step": 2, "lo')
    assert resume(run, 1) == ""
    assert (run.logs / "lost-metrics.jsonl").read_bytes() == b'{"step": 2, "lo\n'


def test_a_last_line_without_its_line_feed_is_kept(run: RunDir) -> None:
    """An editor may have removed it."""
    run.metrics.write_bytes(lines(1, 2)[:-1])
    assert resume(run, 2) == ""
    assert run.metrics.read_bytes() == lines(1, 2) + b'{"step": 3, "loss": 0.5}\n'


def test_values_that_are_not_finite_are_kept_as_they_are(run: RunDir) -> None:
    odd = b'{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n{"step": 2}\n'
    run.metrics.write_bytes(odd)
    assert resume(run, 2) == ""
    assert run.metrics.read_bytes().startswith(odd)
    draw_loss(run.metrics, run.plot)
    assert run.plot.read_bytes().startswith(b"\x89PNG")
