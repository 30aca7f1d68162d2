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
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """The text of a regular file. Raises OSError, or ValueError if it is not UTF-8."""
    with open_file(path) as file:
        return file.read().decode("utf-8")
