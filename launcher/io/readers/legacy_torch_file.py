"""Reads a file of torch before 1.6 without executing its pickles and without reading its tensors.

It is a sequence of pickles: a magic number, a version, a description of the machine, the object,
and the keys of its storages. For each key follow the number of elements (8 bytes) and the elements
(torch.serialization, `_legacy_save`).
"""

from __future__ import annotations

import mmap
from functools import partial
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders import regular
from launcher.io.readers.unpickle import ByteRanges, Storage, find_storage, parse_storage
from launcher.io.readers.unpickler import load_from

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
MAX_PICKLE_BYTES = 1 << 28  # of all pickles together; the storages are not in them
MAX_LINE = 1 << 16
COUNT_BYTES = 8


def read_legacy(path: Path) -> Any:
    """The saved object, with `Tensor`s for tensors. Raises UserError if it is damaged or of another
    format, or names a class that checkpoints do not need."""
    size = path.stat().st_size
    if not size:
        raise UserError(f"{path} is empty")
    with (
        regular.open_file(path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        stream = _Stream(content, min(size, MAX_PICKLE_BYTES))
        if _next(path, stream) != MAGIC or _next(path, stream) != VERSION:
            raise UserError(f"{path} cannot be read as a torch.save file: it is of another format")
        machine = _next(path, stream)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise UserError(f"{path} was saved on a big-endian machine, which is not supported")
        begin, widths = stream.at, dict[str, int]()

        def note_width(pid: Any) -> Storage:
            dtype, key, count = parse_storage(path, pid)
            widths[key] = dtype.itemsize
            return Storage(path, key, dtype, 0, count * dtype.itemsize)

        load_from(path, stream, stream.size, note_width)  # to find its end, and what follows
        storages = _storages(path, content, _next(path, stream), stream.at, widths)
        stream.at = begin
        return load_from(path, stream, stream.size, partial(find_storage, path, storages))


def _next(path: Path, stream: _Stream) -> Any:
    return load_from(path, stream, stream.size, partial(find_storage, path, {}))


def _storages(
    path: Path, content: mmap.mmap, keys: Any, at: int, widths: dict[str, int]
) -> ByteRanges:
    """The bytes of each storage. `at`: where the first one begins."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path} is damaged: it has no list of its storages")
    storages: ByteRanges = {}
    for key in keys:
        if key not in widths:
            raise UserError(f"{path} is damaged: no tensor needs its storage {key}")
        begin = at + COUNT_BYTES
        length = int.from_bytes(content[at:begin], "little") * widths[key]
        at = begin + length
        if at > len(content):
            raise UserError(f"{path} ends inside storage {key}: it is truncated")
        storages[key] = begin, length
    return storages


class _Stream:
    """The pickles of a file. A read beyond their end fails before it takes memory."""

    def __init__(self, content: mmap.mmap, size: int) -> None:
        self.content, self.size, self.at = content, size, 0

    def read(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise EOFError("it ends inside a pickle")
        self.at += count
        return self.content[self.at - count : self.at]

    def readline(self) -> bytes:
        end = self.content.find(b"\n", self.at, self.at + MAX_LINE)
        if end < 0:
            raise EOFError("a line has no end")
        return self.read(end + 1 - self.at)
