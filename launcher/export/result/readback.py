"""What the disk holds against what was written: checksums of each file and each tensor."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError
from launcher.export.readers.safetensors_file import data_ranges
from launcher.export.result.progress import Progress

BLOCK = 1 << 20  # larger ones read slower: they leave the processor's cache
WHOLE_UP_TO = 64 << 20  # bytes; of a larger source file samples are hashed
SAMPLES, SAMPLE = 64, 1 << 20


def compare(folder: Path, files: Mapping[str, Mapping[str, Any]], at_once: int) -> None:
    """Read every file of `files` (name → bytes, xxh3_128, tensors: name → xxh3_64) back.

    Raises UserError naming each file, and in it each tensor, that is not what was written.
    """
    total = sum(entry["bytes"] for entry in files.values())
    with Progress("reading back", total) as progress, ThreadPoolExecutor(at_once) as pool:
        jobs = [
            pool.submit(_problems, folder / name, entry, progress) for name, entry in files.items()
        ]
        if wrong := [problem for job in jobs for problem in job.result()]:
            raise UserError("; ".join(wrong))


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and xxh3-128 of a source file; of a file over 64 MiB the hash is of 64 samples of 1 MiB,
    evenly spaced: it tells another file, not every flipped bit."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if size <= WHOLE_UP_TO:
            digest.update(file.read())
            return {"bytes": size, "xxh3_128": digest.hexdigest()}
        for number in range(SAMPLES):
            file.seek((size - SAMPLE) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return {"bytes": size, "xxh3_128_of_samples": digest.hexdigest()}


def _problems(path: Path, entry: Mapping[str, Any], progress: Progress) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    if (size := path.stat().st_size) != entry["bytes"]:
        return [f"{path} has {size} bytes instead of {entry['bytes']}"]
    whole, tensors = _hashes(path, progress)
    if whole == entry["xxh3_128"]:
        return []
    changed = [name for name, value in tensors.items() if entry["tensors"].get(name) != value]
    where = (
        f"in {', '.join(changed[:3])} ({len(changed)} tensor(s))" if changed else "in its header"
    )
    return [f"{path} has another content than when it was written, {where}"]


def _hashes(path: Path, progress: Progress) -> tuple[str, dict[str, str]]:
    """xxh3-128 of a safetensors file and xxh3-64 of each tensor, in one reading."""
    try:
        ranges = sorted((begin, end, name) for name, (begin, end) in data_ranges(path).items())
    except UserError:  # the header itself is damaged: the file's hash will tell
        ranges = []
    whole, parts = xxhash.xxh3_128(), {name: xxhash.xxh3_64() for *_, name in ranges}
    at = current = 0
    for block in _blocks(path):
        whole.update(block)
        end = at + len(block)
        while current < len(ranges) and ranges[current][0] < end:
            first, last, name = ranges[current]
            parts[name].update(block[max(first - at, 0) : last - at])
            if last > end:
                break
            current += 1
        at = end
        progress.advance(len(block))
    return whole.hexdigest(), {name: digest.hexdigest() for name, digest in parts.items()}


def _blocks(path: Path) -> Iterator[memoryview]:
    """The file in blocks, past the page cache where the file system allows; each block is valid
    until the next."""
    file = _open(path)
    size = os.fstat(file).st_size
    try:
        room = memoryview(mmap.mmap(-1, BLOCK))
        at = 0
        while at < size:
            count = os.preadv(file, [room], at)
            if count == 0:
                raise UserError(f"{path} ends at byte {at} while it is read")
            yield room[:count]
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
