"""Which checkpoints are kept. Only one process deletes. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.folders.checkpoint import Checkpoint, finished_checkpoints


def checkpoints_to_delete(checkpoints: list[Checkpoint], keep_last: int) -> list[Checkpoint]:
    """All except the newest `keep_last` and the one with the lowest evaluation loss."""
    by_loss = [
        (loss, -checkpoint.step)
        for checkpoint in checkpoints
        if (loss := checkpoint.summary()["eval_loss"]) is not None
    ]
    best_step = -min(by_loss)[1] if by_loss else None
    newest_first = sorted(checkpoints, key=lambda checkpoint: -checkpoint.step)
    return [each for each in newest_first[keep_last:] if each.step != best_step]


def delete_old_checkpoints(checkpoints: Path, keep_last: int) -> None:
    """Delete the checkpoints that are not kept. Each is renamed first, so that a partly deleted one
    is not taken for a checkpoint."""
    for checkpoint in checkpoints_to_delete(finished_checkpoints(checkpoints), keep_last):
        renamed = checkpoint.path.with_name(f".{checkpoint.path.name}.deleted")
        checkpoint.path.rename(renamed)
        shutil.rmtree(renamed)


def delete_leftovers(checkpoints: Path) -> None:
    """Delete what an attempt that died was writing or deleting."""
    for suffix in ("partial", "deleted"):
        for path in checkpoints.glob(f".step-*.{suffix}"):
            shutil.rmtree(path)
