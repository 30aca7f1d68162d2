"""The models that one talks to, each in a process of its own, and what there is to talk to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from launcher import overview, paths
from launcher.chat import subject
from launcher.chat.remote import Remote
from launcher.checkpoint import layout
from launcher.config.adapter import SETTINGS
from launcher.config.model_rules import is_hub_id, read_settings
from launcher.run_dir import RunDir
from launcher.ui.places import Places

SIDES = ("A", "B")


class Models:
    """At most one loaded model a side, for all windows of the page."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._loaded: dict[str, Remote] = {}
        self._lock = threading.Lock()

    def load(self, side: str, path: str, base: str) -> None:
        """Begin to load what is at `path` in place of what is there.

        Raises UserError for what cannot be talked to, or leads out of the roots.
        """
        where = self.places.to_read(path)
        given = self.places.to_read(base) if base.strip() else None
        found = subject.find(where, given)
        for folder in (found.model, found.tokenizer, found.adapter):
            if folder is not None:  # an adapter names its base itself
                self.places.to_read(folder)
        with self._lock:
            before, self._loaded[side] = self._loaded.get(side), Remote(where, given)
        if before is not None:
            before.close()

    def unload(self, side: str) -> None:
        """End the process, if there is one."""
        with self._lock:
            remote = self._loaded.pop(side, None)
        if remote is not None:
            remote.close()

    def get(self, side: str) -> Remote | None:
        return self._loaded.get(side)

    def close(self) -> None:
        for side in SIDES:
            self.unload(side)


def subjects(places: Places) -> list[str]:
    """What can be talked to: exports, adapters of checkpoints, fetched models. Paths as one would
    type them in the first root."""
    found = [places.typed(path) for path in _of_runs(places)]
    models = sorted(path.parent for path in paths.cache().glob("models/*/config.json"))
    return [*found, *map(str, models)]


def sources(places: Places) -> list[str]:
    """What can be exported: runs, and each of their checkpoints."""
    listed = []
    for run in _runs(places):
        checkpoints = layout.finished(run.checkpoints)
        listed += [places.typed(path) for path in (run.path, *(c.path for c in checkpoints))]
        if not checkpoints:
            listed.pop()
    return listed


def _of_runs(places: Places) -> Iterator[Path]:
    for run in _runs(places):
        yield from sorted(file.parent for file in run.path.glob("export*/config.json"))
        yield from (c.path for c in layout.finished(run.checkpoints) if c.adapter)


def _runs(places: Places) -> list[RunDir]:
    if not places.runs.is_dir():
        return []
    return list(reversed(overview.runs_in(places.runs)))


def bases_of(path: Path) -> Iterator[str]:
    """The folders that a run, a checkpoint or an adapter names as its base."""
    checkpoints = RunDir(path).checkpoints
    if checkpoints.is_dir():
        path = layout.newest(checkpoints).path
    checkpoint = layout.Checkpoint(path)
    adapters = [read_settings(folder, SETTINGS) for folder in (path, checkpoint.adapter) if folder]
    bases = [settings.get("base_model_name_or_path") for settings in adapters]
    if checkpoint.is_finished:
        bases.append(checkpoint.summary().get("base", {}).get("name_or_path"))
    yield from (base for base in bases if isinstance(base, str) and not is_hub_id(base))
