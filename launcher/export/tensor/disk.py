"""Bytes off the disk: positional reads through a cache of open files."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from launcher.errors import UserError

MOST_OPEN = 256  # descriptors kept; the usual limit of a process is 1,024

_open: OrderedDict[tuple[int, int], int] = OrderedDict()  # (device, inode) → descriptor
_lock = threading.Lock()


def read_into(out: memoryview, file: Path, begin: int, name: str) -> None:
    """Fill `out` with the bytes of `file` from `begin` on. `name`: the tensor, for the error."""
    at = 0
    while at < len(out):
        with _Borrowed(file) as descriptor:
            count = os.preadv(descriptor, [out[at:]], begin + at)
        if count == 0:
            raise UserError(f"{file} ends inside tensor {name}: it was cut short")
        at += count


def read_plainly(file: Path, begin: int, length: int) -> bytearray:
    """The same bytes by another way: an ordinary buffered read."""
    with file.open("rb") as stream:
        stream.seek(begin)
        data = bytearray(stream.read(length))
    if len(data) != length:
        raise UserError(f"{file} ends before byte {begin + length}: it was cut short")
    return data


class _Borrowed:
    """A descriptor of `file` that nobody closes meanwhile. Kept by inode: a file written anew
    under the same name is opened anew."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> int:
        status = os.stat(self.file)
        self.key = status.st_dev, status.st_ino
        with _lock:
            found = _open.pop(self.key, None)
        self.descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC) if found is None else found
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        with _lock:
            closing = [_open.pop(self.key)] if self.key in _open else []
            _open[self.key] = self.descriptor
            if len(_open) > MOST_OPEN:
                closing.append(_open.popitem(last=False)[1])
        for descriptor in closing:
            os.close(descriptor)
