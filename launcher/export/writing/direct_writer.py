"""Writes a file past the page cache: one buffer is filled while the other is written and hashed.

Direct I/O (O_DIRECT) reaches the full speed of a disk and does not evict a training job's pages
from the cache. Some file systems do not support it (tmpfs, some network mounts). There, ordinary
writes are flushed and their pages dropped as the file grows.
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

from launcher.export.writing.readback import PAGE_BYTES, Follower

BUFFER_BYTES = 8 << 20  # of each buffer, unless a tile is larger
FLUSH_BYTES = 256 << 20  # between flushes, when writes go through the page cache


class Sink:
    """A new file at `path`. `reserve` returns memory to fill, in the order of the file.

    `read_back`: read the file from the disk while it is written, if writes are direct.
    """

    def __init__(self, path: Path, direct: bool = True, read_back: bool = False) -> None:
        self.path = path
        self.bytes = 0
        self.is_read_back = False  # whether finish() has found the written bytes on the disk
        self._file, self.direct = _create(path, direct)
        self._follower = Follower(path) if read_back and self.direct else None
        self._buffers = [_page_aligned(BUFFER_BYTES), _page_aligned(BUFFER_BYTES)]
        self._current = 0  # the buffer that is being filled
        self._filled = 0
        self._at = 0  # offset in the file of the buffer's first byte
        self._flushed = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sink")
        self._pending: list[Future[None]] = []
        self._digest = xxhash.xxh3_128()

    def reserve(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` of the file (uint8). Fill them before the next call."""
        if self._filled + nbytes > len(self._buffers[self._current]):
            self._swap_buffers(nbytes)
        begin = self._filled
        self._filled += nbytes
        self.bytes += nbytes
        return self._buffers[self._current][begin : self._filled]

    def finish(self) -> str:
        """Write the rest and flush it to the disk. Returns the file's xxh3-128 in hexadecimal."""
        self._wait()
        rest = self._buffers[self._current][: self._filled]
        self._digest.update(_view(rest))
        if self.direct:  # direct writes consist of whole pages; the file is truncated below
            padded = -(-self._filled // PAGE_BYTES) * PAGE_BYTES
            if padded > len(self._buffers[self._current]):
                larger = _page_aligned(padded)
                larger[: self._filled] = rest
                self._buffers[self._current] = larger
            rest = self._buffers[self._current][:padded]
        _write(self._file, _view(rest), self._at)
        os.ftruncate(self._file, self.bytes)
        os.fsync(self._file)
        self._drop_cached_pages()
        if self._follower is not None:
            self.is_read_back = self._follower.finish(self.bytes) == self._digest.hexdigest()
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
        if self._follower is not None:
            self._follower.close()
        os.close(self._file)

    def _swap_buffers(self, needed: int) -> None:
        """Start writing the whole pages of the full buffer. The rest becomes the start of the other
        buffer, which gets space for `needed` more bytes."""
        full = self._buffers[self._current]
        page_bytes = self._filled // PAGE_BYTES * PAGE_BYTES
        rest = full[page_bytes : self._filled]
        self._wait()
        self._current = 1 - self._current
        if len(self._buffers[self._current]) < len(rest) + needed:
            self._buffers[self._current] = _page_aligned(len(rest) + needed)
        self._buffers[self._current][: len(rest)] = rest
        self._pending = [self._writer.submit(self._write_pages, full[:page_bytes], self._at)]
        self._at += page_bytes
        self._filled = len(rest)

    def _write_pages(self, pages: torch.Tensor, at: int) -> None:
        self._digest.update(_view(pages))
        _write(self._file, _view(pages), at)
        if self._follower is not None:
            self._follower.follow(at + len(pages))
        if not self.direct and at + len(pages) - self._flushed >= FLUSH_BYTES:
            os.fdatasync(self._file)
            self._drop_cached_pages()
            self._flushed = at + len(pages)

    def _drop_cached_pages(self) -> None:
        if not self.direct:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _wait(self) -> None:
        """Wait until the other buffer is written. Raises the error of that write."""
        for pending in self._pending:
            pending.result()
        self._pending = []


def _create(path: Path, direct: bool) -> tuple[int, bool]:
    """(descriptor of the new file, whether it accepts direct writes). One page is written as a
    test."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if direct:
        try:
            descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems create the file and then refuse
        else:
            try:
                os.pwrite(descriptor, _view(_page_aligned(PAGE_BYTES)), 0)
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


def _page_aligned(nbytes: int) -> torch.Tensor:
    """Page-aligned zeros, at least `nbytes`."""
    return torch.frombuffer(mmap.mmap(-1, -(-nbytes // PAGE_BYTES) * PAGE_BYTES), dtype=torch.uint8)


def _view(tensor: torch.Tensor) -> memoryview:
    return tensor.numpy().data
