"""Open a file that may be somebody else's. A pipe of that name would make whoever opens it wait for
ever.

Imports no torch.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes. Raises OSError for a pipe, a device, a socket."""
    return os.fdopen(open_descriptor(path, os.O_RDONLY), "rb")


def open_descriptor(path: Path, flags: int) -> int:
    """A descriptor of a regular file; `flags` may create it. Raises OSError for all others."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def write_text(path: Path, text: str) -> None:
    """Write the text of a regular file, which may not exist. Raises OSError."""
    with os.fdopen(open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
        file.write(text.encode())


def read_text(path: Path) -> str:
    """The text of a regular file. Raises OSError, or ValueError if it is not UTF-8."""
    with open_file(path) as file:
        return file.read().decode("utf-8")
