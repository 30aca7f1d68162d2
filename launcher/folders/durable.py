"""Files that are complete once they have their name, also after a power failure. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def replace(temporary: Path, path: Path) -> None:
    """Give a complete file its name: a reader, and a machine that starts again after a power
    failure, find the complete file or the previous one."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
