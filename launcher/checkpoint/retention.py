"""Which checkpoints are kept. One process deletes. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.checkpoint.layout import Checkpoint, finished


def surplus(checkpoints: list[Checkpoint], keep_last: int) -> list[Checkpoint]:
    """All but the newest `keep_last` and the best by evaluation loss."""
    by_loss = [
        (loss, -checkpoint.step)
        for checkpoint in checkpoints
        if (loss := checkpoint.summary()["eval_loss"]) is not None
    ]
    best = -min(by_loss)[1] if by_loss else None
    newest_first = sorted(checkpoints, key=lambda checkpoint: -checkpoint.step)
    return [each for each in newest_first[keep_last:] if each.step != best]


def prune(checkpoints: Path, keep_last: int) -> None:
    """Delete the surplus. A checkpoint loses its name first: half of one is never found."""
    for checkpoint in surplus(finished(checkpoints), keep_last):
        aside = checkpoint.path.with_name(f".{checkpoint.path.name}.deleted")
        checkpoint.path.rename(aside)
        shutil.rmtree(aside)


def clear_leftovers(checkpoints: Path) -> None:
    """Delete what an attempt that died was writing or deleting."""
    for suffix in ("partial", "deleted"):
        for path in checkpoints.glob(f".step-*.{suffix}"):
            shutil.rmtree(path)
