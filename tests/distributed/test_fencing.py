"""An attempt that was given up keeps no checkpoint beside those of a newer one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher import run_dir
from launcher.checkpoint import layout
from launcher.distributed.process_group import Place
from launcher.errors import UserError
from launcher.run_dir import RunDir
from tests.helpers import parts
from tests.helpers.parts import Case


def save_twice(place: Place, case: Case, folder: Path) -> str:
    """Save as attempt 1, before and after attempt 2 begins; what the second save says."""
    strategy, method, loader = parts.set_up(place, case)
    saver = parts.saver(parts.learner(place, case, strategy, method), folder)
    parts.train_step(strategy, loader.window(0))
    saver.save(1, 0, None)
    if place.is_main:
        for _ in range(2):
            run_dir._next_attempt(folder)
    try:
        saver.save(2, 0, None)
    except UserError as error:
        return str(error)
    return "saved"


def test_the_older_attempt_cannot_commit(
    ranks: Any, tmp_path: Path, tiny: Path, rows_file: Path
) -> None:
    said = ranks.run(2, save_twice, Case(tiny, rows_file), tmp_path)
    assert len(set(said)) == 1, "all ranks end"
    assert f"attempt 2 of {tmp_path} has begun" in said[0]
    assert [each.step for each in layout.finished(tmp_path / "checkpoints")] == [1]
    assert RunDir(tmp_path).newest().attempt == 2
