"""The loaded models, each in its own process, and what the page offers to chat with and export."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from launcher.chat.remote import RemoteModel
from launcher.chat.target import find_target
from launcher.folders import paths
from launcher.folders.adapter import SETTINGS
from launcher.folders.checkpoint import Checkpoint, finished_checkpoints, newest_checkpoint
from launcher.folders.json_file import read_object_or_empty
from launcher.folders.model import is_hub_id
from launcher.folders.run import RunDir
from launcher.run.status import find_runs
from launcher.ui.roots import Roots

SIDES = ("A", "B")


class LoadedModels:
    """At most one loaded model per side. All windows of the page share them."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self._loaded: dict[str, RemoteModel] = {}
        self._lock = threading.Lock()

    def load(self, side: str, path: str, base: str) -> None:
        """Start to load the model at `path`. It replaces the side's current model.

        Raises UserError if one cannot chat with it, or if it lies outside the roots.
        """
        folder = self.roots.to_read(path)
        base_folder = self.roots.to_read(base) if base.strip() else None
        target = find_target(folder, base_folder)
        for used in (target.model, target.tokenizer, target.adapter):
            if used is not None:  # an adapter may name a base outside the roots
                self.roots.to_read(used)
        with self._lock:
            previous = self._loaded.get(side)
            self._loaded[side] = RemoteModel(folder, base_folder)
        if previous is not None:
            previous.close()

    def unload(self, side: str) -> None:
        """End the process of a side's model, if there is one."""
        with self._lock:
            remote = self._loaded.pop(side, None)
        if remote is not None:
            remote.close()

    def get(self, side: str) -> RemoteModel | None:
        """The model of a side, None if no model is loaded."""
        return self._loaded.get(side)

    def close(self) -> None:
        """Unload all models."""
        for side in SIDES:
            self.unload(side)


def chat_choices(roots: Roots) -> list[str]:
    """Paths to chat with: exports, checkpoints with adapters, fetched models.

    Paths in the first root are relative to it.
    """
    in_runs = [roots.short_path(path) for path in _chat_folders(roots)]
    models = sorted(path.parent for path in paths.cache().glob("models/*/config.json"))
    return [*in_runs, *map(str, models)]


def export_choices(roots: Roots) -> list[str]:
    """Paths to export: runs with a finished checkpoint, and each of their checkpoints."""
    choices = []
    for run in _runs(roots):
        if checkpoints := finished_checkpoints(run.checkpoints):
            folders = [run.path, *(checkpoint.path for checkpoint in checkpoints)]
            choices += [roots.short_path(folder) for folder in folders]
    return choices


def _chat_folders(roots: Roots) -> Iterator[Path]:
    for run in _runs(roots):
        yield from sorted(file.parent for file in run.path.glob("export*/config.json"))
        yield from (c.path for c in finished_checkpoints(run.checkpoints) if c.adapter)


def _runs(roots: Roots) -> list[RunDir]:
    """All runs, newest first."""
    if not roots.runs.is_dir():
        return []
    return list(reversed(find_runs(roots.runs)))


def base_folders(path: Path) -> Iterator[str]:
    """The folders that a run, a checkpoint or an adapter names as its base model."""
    checkpoints = RunDir(path).checkpoints
    if checkpoints.is_dir():
        path = newest_checkpoint(checkpoints).path
    checkpoint = Checkpoint(path)
    adapters = [
        read_object_or_empty(folder / SETTINGS) for folder in (path, checkpoint.adapter) if folder
    ]
    bases = [settings.get("base_model_name_or_path") for settings in adapters]
    recorded = checkpoint.summary().get("base") if checkpoint.is_finished else None
    if isinstance(recorded, dict):
        bases.append(recorded.get("name_or_path"))
    yield from (base for base in bases if isinstance(base, str) and not is_hub_id(base))
