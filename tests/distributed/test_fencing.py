"""An abandoned attempt cannot commit a checkpoint next to those of a newer attempt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders.checkpoint import finished_checkpoints
from launcher.folders.run import RunDir
from launcher.run import create
from tests.helpers import checkpoints, parts
from tests.helpers.parts import Case


def save_twice(rank_info: RankInfo, case: Case, folder: Path) -> str:
    """Save as attempt 1, before and after attempt 2 starts; return what the second save reports."""
    train_state, loader = parts.set_up(rank_info, case)
    saver = checkpoints.saver(train_state, case.config(), folder)
    parts.train_step(train_state.strategy, loader.step_batch(0))
    saver.save(1, 0, None)
    if rank_info.is_main:
        for _ in range(2):
            create._create_attempt(folder, job="7", follows=None)
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
    assert f"attempt 2 of {tmp_path} has started" in said[0]
    assert [each.step for each in finished_checkpoints(tmp_path / "checkpoints")] == [1]
    assert RunDir(tmp_path).newest_attempt().attempt == 2
