"""Reads bytes at a position of a file, with a cache of open files."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from launcher.errors import UserError
from launcher.folders import regular

AHEAD_BYTES = 4 << 20  # that the disk is asked for beyond a read: as a rule, the next rows
MAX_OPEN_FILES = 256  # in the cache; the usual limit of a process is 1,024

_open: OrderedDict[tuple[int, int], int] = OrderedDict()  # (device, inode) → descriptor
_lock = threading.Lock()


def read_into(out: memoryview, file: Path, begin: int, name: str) -> None:
    """Fill `out` with the bytes of `file` from `begin`. `name`: the tensor, for the error message.

    Raises UserError if the file ends too early.
    """
    at = 0
    while at < len(out):
        with _OpenFile(file) as descriptor:
            if at == 0:
                os.posix_fadvise(descriptor, begin, len(out) + AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            count = os.preadv(descriptor, [out[at:]], begin + at)
        if count == 0:
            raise UserError(f"{file} ends inside tensor {name}: it is truncated")
        at += count


def close_files() -> None:
    """Close the cached files. Until then, the disk keeps the space of those that are deleted."""
    with _lock:
        descriptors = list(_open.values())
        _open.clear()
    for descriptor in descriptors:
        os.close(descriptor)


def read_buffered(file: Path, begin: int, length: int) -> bytearray:
    """The bytes [begin, begin + length), read independently of `read_into`: with ordinary buffered
    I/O. Raises UserError if the file ends too early."""
    with regular.open_file(file) as stream:
        stream.seek(begin)
        data = bytearray(stream.read(length))
    if len(data) != length:
        raise UserError(f"{file} ends before byte {begin + length}: it is truncated")
    return data


class _OpenFile:
    """A descriptor of `file` that no other thread closes or uses during the `with` block.

    The cache is keyed by inode: a file that was replaced under the same name is opened again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> int:
        status = os.stat(self.file)
        self.key = status.st_dev, status.st_ino
        with _lock:
            cached = _open.pop(self.key, None)
        if cached is None:
            cached = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        self.descriptor = cached
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        with _lock:
            closing = [_open.pop(self.key)] if self.key in _open else []
            _open[self.key] = self.descriptor
            if len(_open) > MAX_OPEN_FILES:
                closing.append(_open.popitem(last=False)[1])
        for descriptor in closing:
            os.close(descriptor)
