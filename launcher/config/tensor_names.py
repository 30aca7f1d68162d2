"""Names of the tensors in a model folder, read without torch."""

from __future__ import annotations

import json
from pathlib import Path


def tensor_names(folder: Path) -> set[str]:
    """From the index or the files' own headers; empty where they cannot be read: the loader says
    why."""
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            return set(json.loads(index.read_text())["weight_map"])
        names: set[str] = set()
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                names |= json.loads(file.read(size)).keys() - {"__metadata__"}
        return names
    except (OSError, ValueError, KeyError):
        return set()


def lacking(folder: Path, modules: list[str]) -> list[str]:
    """Those of `modules` that are in no tensor's name. Nothing is known of folders without names
    and of experts, which are other modules in memory than on disk; a tied head is not on disk."""
    names = tensor_names(folder)
    if not names or any(".experts." in name for name in names):
        return []
    dotted = [f".{name}" for name in names]
    return [
        module
        for module in modules
        if module != "lm_head" and not any(f".{module}." in name for name in dotted)
    ]
