"""Reads files back and compares the checksums of each file and each tensor with what was
written: behind the writer, while it writes, or afterwards."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError
from launcher.export.writing.progress import Progress
from launcher.io.readers.safetensors_file import data_ranges

BLOCK_BYTES = 1 << 20  # larger blocks are slower: they do not fit in the processor's cache
MAX_HASHED_BYTES = 64 << 20  # of a larger source file, samples are hashed
SAMPLES, SAMPLE_BYTES = 64, 64 << 10
PAGE_BYTES = 4096


class Follower:
    """Reads a file from the disk while another thread writes it, and hashes it.

    Only for a file that is written past the page cache: otherwise the reads would see the cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        self._buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self._digest = xxhash.xxh3_128()
        self._at = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read back")
        self._pending: list[Future[None]] = []

    def follow(self, end: int) -> None:
        """Read on to byte `end`, a whole page, up to which the file is written. Does not wait."""
        self._pending.append(self._reader.submit(self._read_to, end))

    def finish(self, end: int) -> str:
        """Read the rest of a file of `end` bytes that is complete and flushed. Returns its xxh3-128
        in hexadecimal. Raises OSError if the disk cannot be read."""
        self.follow(end)
        for pending in self._pending:
            pending.result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(cancel_futures=True)
        os.close(self._file)

    def _read_to(self, end: int) -> None:
        while self._at < end:
            # A direct read asks for whole pages, and gets less at the end of the file.
            pages = -(-(end - self._at) // PAGE_BYTES)
            wanted = min(BLOCK_BYTES, pages * PAGE_BYTES)
            count = os.preadv(self._file, [self._buffer[:wanted]], self._at)
            if count == 0:
                raise UserError(f"{self.path} ended at byte {self._at} while it was read")
            self._digest.update(self._buffer[:count])
            self._at += count


def compare_checksums(
    folder: Path, files: Mapping[str, Mapping[str, Any]], parallel_files: int
) -> None:
    """Read every file of `files` back. `files`: name → bytes, xxh3_128, tensors: name → xxh3_64.

    Raises UserError with the names of all files, and of their tensors, that are not what was
    written.
    """
    total = sum(entry["bytes"] for entry in files.values())
    with Progress("reading back", total) as progress, ThreadPoolExecutor(parallel_files) as pool:
        jobs = [
            pool.submit(_problems, folder / name, entry, progress) for name, entry in files.items()
        ]
        if problems := [problem for job in jobs for problem in job.result()]:
            raise UserError("; ".join(problems))


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and xxh3-128 of a source file.

    For a file over 64 MiB, only 64 evenly spaced samples of 64 KiB are hashed: this distinguishes
    files, but does not detect every flipped bit.
    """
    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if size <= MAX_HASHED_BYTES:
            digest.update(file.read())
            return {"bytes": size, "xxh3_128": digest.hexdigest()}
        for number in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return {"bytes": size, "xxh3_128_of_samples": digest.hexdigest()}


def _problems(path: Path, entry: Mapping[str, Any], progress: Progress) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    if (size := path.stat().st_size) != entry["bytes"]:
        return [f"{path} has {size} bytes instead of {entry['bytes']}"]
    file_hash, tensors = _hashes(path, progress)
    if file_hash == entry["xxh3_128"]:
        return []
    changed = [name for name, value in tensors.items() if entry["tensors"].get(name) != value]
    location = (
        f"in {', '.join(changed[:3])} ({len(changed)} tensor(s))" if changed else "in its header"
    )
    return [f"{path} has changed since it was written, {location}"]


def _hashes(path: Path, progress: Progress) -> tuple[str, dict[str, str]]:
    """(xxh3-128 of a safetensors file, name → xxh3-64 of each tensor), from one pass."""
    try:
        ranges = sorted((begin, end, name) for name, (begin, end) in data_ranges(path).items())
    except UserError:  # the header itself is damaged: the file's hash will differ
        ranges = []
    file_digest, digests = xxhash.xxh3_128(), {name: xxhash.xxh3_64() for *_, name in ranges}
    at = current = 0
    for block in blocks(path):
        file_digest.update(block)
        end = at + len(block)
        while current < len(ranges) and ranges[current][0] < end:
            first, last, name = ranges[current]
            digests[name].update(block[max(first - at, 0) : last - at])
            if last > end:
                break
            current += 1
        at = end
        progress.advance(len(block))
    return file_digest.hexdigest(), {name: d.hexdigest() for name, d in digests.items()}


def blocks(path: Path) -> Iterator[memoryview]:
    """The file in blocks, past the page cache if the file system supports it. Each block is valid
    until the next one."""
    file = _open(path)
    size = os.fstat(file).st_size
    try:
        buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        at = 0
        while at < size:
            count = os.preadv(file, [buffer], at)
            if count == 0:
                raise UserError(f"{path} ended at byte {at} while it was read")
            yield buffer[:count]
            at += count
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
