"""Which checkpoints are kept. Only one process deletes. Imports no torch."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

from launcher.folders.checkpoint import NAME, Checkpoint, finished_checkpoints

LEFTOVER = re.compile(rf"\.{NAME.pattern}\.(partial|deleted)")


def checkpoints_to_delete(checkpoints: list[Checkpoint], keep_last: int) -> list[Checkpoint]:
    """All except the newest `keep_last` and the one with the lowest evaluation loss."""
    by_loss = [
        (loss, -checkpoint.step)
        for checkpoint in checkpoints
        if (loss := checkpoint.summary().get("eval_loss")) is not None and math.isfinite(loss)
    ]
    best_step = -min(by_loss)[1] if by_loss else None
    newest_first = sorted(checkpoints, key=lambda checkpoint: -checkpoint.step)
    return [each for each in newest_first[keep_last:] if each.step != best_step]


def delete_old_checkpoints(checkpoints: Path, keep_last: int) -> None:
    """Delete the checkpoints that are not kept. Each is renamed first, so that a partly deleted one
    is not taken for a checkpoint. Links to checkpoints elsewhere are left alone."""
    own = [each for each in finished_checkpoints(checkpoints) if not each.path.is_symlink()]
    for checkpoint in checkpoints_to_delete(own, keep_last):
        renamed = checkpoint.path.with_name(f".{checkpoint.path.name}.deleted")
        checkpoint.path.rename(renamed)
        shutil.rmtree(renamed)


def delete_leftovers(checkpoints: Path) -> None:
    """Delete what an attempt that died was writing or deleting."""
    for path in checkpoints.iterdir():
        if LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def move_aside(path: Path, prefix: str = "broken") -> Path:
    """Rename what has the name of a checkpoint and is none, or is not to be resumed from, to
    `PREFIX-N-step-…`, so that the step can be saved. Returns the new path."""
    number = 1
    while os.path.lexists(new := path.with_name(f"{prefix}-{number}-{path.name}")):
        number += 1
    return path.rename(new)
