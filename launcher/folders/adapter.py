"""The folder of a PEFT adapter. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.folders.checkpoint import ADAPTER, all_checkpoints
from launcher.folders.json_file import read_object_or_empty

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def adapter_folder(path: str) -> Path | None:
    """The PEFT folder that `path` is or contains, None if there is none.

    `path` is an adapter, a checkpoint, or a run, whose newest checkpoint is used.
    """
    start = Path(path)
    newest = next((c for c in all_checkpoints(start / "checkpoints") if c.is_finished), None)
    candidates = [start, start / ADAPTER, *([newest.path / ADAPTER] if newest else [])]
    return next(
        (c for c in candidates if (c / SETTINGS).is_file() and (c / WEIGHTS).is_file()), None
    )


def adapter_settings(path: str) -> dict[str, Any]:
    """adapter_config.json of the adapter that `path` is or contains; empty if unreadable."""
    folder = adapter_folder(path)
    return read_object_or_empty(folder / SETTINGS) if folder else {}
