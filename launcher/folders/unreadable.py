"""Why a file cannot be read: it is a pointer of git-LFS, a link to nothing, or not to be read by
this user. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.folders import regular

POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer file begins
MAX_POINTER = 1024  # bytes; by git-lfs' specification


def is_pointer(path: Path) -> bool:
    """Whether it is a pointer that git-LFS leaves in place of a file. Raises OSError."""
    with regular.open_file(path) as file:
        return file.read(len(POINTER)) == POINTER and path.stat().st_size < MAX_POINTER


def is_file(path: Path) -> bool:
    """Whether it is a file, or a link to nothing: where a file should be."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def reason_unreadable(path: Path, error: Exception | None = None) -> str | None:
    """The rest of a sentence that begins with the path of a file, None for any other file.

    `error`: what reading it raised.
    """
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        return f"is a link to {target}, which does not exist: No such file → the file itself"
    try:
        if is_pointer(path):
            return "is a pointer of git-LFS and not the file itself → git lfs pull in its folder"
    except OSError as reading:
        error = reading
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return None
