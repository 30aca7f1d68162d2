"""A file written past the page cache: one buffer is filled while the other is written and hashed.

Direct I/O (O_DIRECT) reaches a disk's own speed and leaves the cache of a training job alone; where
the file system has none (tmpfs, some network mounts), ordinary writes are flushed and their pages
given back as they go.
"""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import xxhash

PAGE = 4096
CAPACITY = 8 << 20  # bytes of a buffer, unless a tile is larger
FLUSH_EVERY = 256 << 20  # bytes, where writes go through the page cache


class Sink:
    """A new file at `path`. `room` hands out memory to fill, in the order of the file."""

    def __init__(self, path: Path, direct: bool = True) -> None:
        self.path = path
        self.bytes = 0
        self._file, self.direct = _create(path, direct)
        self._buffers = [_pages(CAPACITY), _pages(CAPACITY)]
        self._turn = 0  # the buffer being filled
        self._filled = 0
        self._at = 0  # offset in the file of the buffer's first byte
        self._flushed = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sink")
        self._pending: list[Future[None]] = []
        self._digest = xxhash.xxh3_128()

    def room(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` of the file (uint8), to be filled before the next call."""
        if self._filled + nbytes > len(self._buffers[self._turn]):
            self._turn_over(nbytes)
        begin = self._filled
        self._filled += nbytes
        self.bytes += nbytes
        return self._buffers[self._turn][begin : self._filled]

    def finish(self) -> str:
        """Write what is left, flush it to the disk; the file's xxh3-128 in hexadecimal."""
        self._wait()
        rest = self._buffers[self._turn][: self._filled]
        self._digest.update(_view(rest))
        if self.direct:  # direct writes come in whole pages; the file is cut to its length below
            padded = -(-self._filled // PAGE) * PAGE
            if padded > len(self._buffers[self._turn]):
                grown = _pages(padded)
                grown[: self._filled] = rest
                self._buffers[self._turn] = grown
            rest = self._buffers[self._turn][:padded]
        _write(self._file, _view(rest), self._at)
        os.ftruncate(self._file, self.bytes)
        os.fsync(self._file)
        self._give_back()
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._writer.shutdown(cancel_futures=True)
        os.close(self._file)

    def _turn_over(self, needed: int) -> None:
        """Send the whole pages of the full buffer to the disk; the rest begins the other one."""
        full = self._buffers[self._turn]
        pages = self._filled // PAGE * PAGE
        rest = full[pages : self._filled]
        self._wait()
        self._turn = 1 - self._turn
        if len(self._buffers[self._turn]) < len(rest) + needed:
            self._buffers[self._turn] = _pages(len(rest) + needed)
        self._buffers[self._turn][: len(rest)] = rest
        self._pending = [self._writer.submit(self._write_pages, full[:pages], self._at)]
        self._at += pages
        self._filled = len(rest)

    def _write_pages(self, pages: torch.Tensor, at: int) -> None:
        self._digest.update(_view(pages))
        _write(self._file, _view(pages), at)
        if not self.direct and at + len(pages) - self._flushed >= FLUSH_EVERY:
            os.fdatasync(self._file)
            self._give_back()
            self._flushed = at + len(pages)

    def _give_back(self) -> None:
        if not self.direct:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _wait(self) -> None:
        """For the other buffer. Raises what writing it raised."""
        for pending in self._pending:
            pending.result()
        self._pending = []


def _create(path: Path, direct: bool) -> tuple[int, bool]:
    """A descriptor of the new file, and whether it takes direct writes: one page is tried."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if direct:
        try:
            descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems make the file and then refuse
        else:
            try:
                os.pwrite(descriptor, _view(_pages(PAGE)), 0)
                return descriptor, True
            except OSError as error:
                os.close(descriptor)
                path.unlink()
                if error.errno != errno.EINVAL:
                    raise
    return os.open(path, flags, 0o666), False


def _write(file: int, data: memoryview, at: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], at + written)


def _pages(nbytes: int) -> torch.Tensor:
    """Page-aligned memory of at least `nbytes`, zeros."""
    return torch.frombuffer(mmap.mmap(-1, -(-nbytes // PAGE) * PAGE), dtype=torch.uint8)


def _view(tensor: torch.Tensor) -> memoryview:
    return tensor.numpy().data
