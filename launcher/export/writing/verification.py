"""Verifies an export file by file, while the files after it are still written."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from launcher.export.plan import Plan
from launcher.export.writing import readback
from launcher.export.writing.recompute import recompute_file


class Verification:
    """Two checks of each file of a plan: the disk returns what was written, and random rows
    computed a second time are the same."""

    def __init__(self, plan: Plan, folder: Path, identity: str) -> None:
        """`identity`: the plan's, which chooses the rows."""
        self.plan, self.folder, self._seed = plan, folder, identity
        self._read_back: dict[str, tuple[int, int]] = {}  # file → its state when it was read
        self._recomputations: list[Future[int]] = []
        self._pool = ThreadPoolExecutor(1, "recompute", torch.set_num_threads, (1,))

    def add(self, name: str, is_read_back: bool) -> None:
        """Check a finished file. Does not wait. `is_read_back`: it was read while it was
        written."""
        if is_read_back:
            self._read_back[name] = _state(self.folder / name)
        self._recomputations.append(
            self._pool.submit(recompute_file, self.plan, self.folder, name, self._seed)
        )

    def finish(self, files: Mapping[str, Mapping[str, Any]], parallel_files: int) -> None:
        """Wait for the checks, and read the files that nobody has read back: those of an earlier
        process, those that have changed since, and all where writes pass the page cache.

        Raises UserError with the names of the files that are wrong, and of their tensors.
        """
        unread = {
            name: entry
            for name, entry in files.items()
            if self._read_back.get(name) != _state(self.folder / name)
        }
        readback.compare_checksums(self.folder, unread, parallel_files)
        for recomputation in self._recomputations:
            recomputation.result()

    def close(self) -> None:
        """Drop the checks that have not begun."""
        self._pool.shutdown(cancel_futures=True)


def _state(path: Path) -> tuple[int, int]:
    """Size and time of the last change: what differs if another process has written the file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
