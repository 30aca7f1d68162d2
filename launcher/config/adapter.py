"""An adapter's folder, looked at without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def adapter_folder(path: str) -> Path | None:
    """The PEFT folder that `path` is or holds: an adapter, a checkpoint, or a run (its newest
    checkpoint). None where there is none."""
    start = Path(path)
    newest = sorted(start.glob("checkpoints/step-*/manifest.json"))[-1:]
    places = [start, start / "adapter", *(manifest.parent / "adapter" for manifest in newest)]
    return next((p for p in places if (p / SETTINGS).is_file() and (p / WEIGHTS).is_file()), None)


def adapter_settings(path: str) -> dict[str, Any]:
    """adapter_config.json of `path`; empty where there is none that can be read."""
    folder = adapter_folder(path)
    try:
        read = json.loads((folder / SETTINGS).read_text()) if folder else {}
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}
