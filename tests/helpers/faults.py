"""Faults in real processes: a kill -9 just before a chosen file is touched, and a full disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def die_at(event: str, pattern: str) -> None:
    """Kill this process with SIGKILL before it touches a path that matches `pattern`.

    `event` is one of Python's audit events (os.mkdir, os.scandir, open, os.rename, …); for
    "open", only opening to write counts. It cannot be undone: use it in a process that no later
    test needs.
    """

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name != event or (name == "open" and not _writes(arguments)):
            return
        if isinstance(arguments[0], str | os.PathLike) and re.search(pattern, str(arguments[0])):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` at `folder`; skips where this user may not mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill `disk` up to its last `leave` bytes; return the file that fills it."""
    free = os.statvfs(disk)
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave)
    return filler
