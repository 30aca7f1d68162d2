"""Whether the checkpoints of a run will fit on its disk. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.config import Config
from launcher.folders.model import is_hub_id
from launcher.machines.facts import free_bytes
from launcher.machines.findings import REFUSED, WARNING, Finding
from launcher.run import footprint


def planned_checkpoints(config: Config) -> int:
    """How many checkpoints will exist at the same time, as far as the configuration says: one is
    written before another is deleted."""
    training, checkpoint = config.training, config.checkpoint
    steps = training.max_steps
    total = 1
    if checkpoint.save_steps and steps:
        total = -(-steps // checkpoint.save_steps)
    if checkpoint.keep_last is None:
        return total
    return min(total, checkpoint.keep_last + 1 + checkpoint.save_best)


def checkpoint_size(config: Config) -> int | None:
    """About the bytes of one checkpoint; None if the model's files are not here."""
    name = config.model.name_or_path
    return None if is_hub_id(name) else footprint.checkpoint_bytes(config, Path(name))


def find_missing_space(config: Config, folder: Path) -> Iterator[Finding]:
    """Nothing if the planned checkpoints fit on the disk of `folder`."""
    size, free = checkpoint_size(config), free_bytes(folder)
    if size is None or free is None:
        return
    count = planned_checkpoints(config)
    fact = f"{free / 1e9:,.1f} GB are free in {folder}"
    out = "→ another run_dir, checkpoint.keep_last=2, or checkpoint.content=weights"
    if size > free:
        yield Finding(REFUSED, f"{fact}, and one checkpoint needs about {size / 1e9:,.1f} GB {out}")
    elif size * count > free:
        planned = f"the {count} planned checkpoints need about {size * count / 1e9:,.1f} GB"
        yield Finding(WARNING, f"{fact}, and {planned} {out}")
