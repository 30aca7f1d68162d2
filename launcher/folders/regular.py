"""Open a file that somebody else wrote. A pipe of that name would make the reader wait for ever.

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


def read_text(path: Path) -> str:
    """The text of a regular file. Raises OSError, or ValueError if it is not UTF-8."""
    with open_file(path) as file:
        return file.read().decode("utf-8")
