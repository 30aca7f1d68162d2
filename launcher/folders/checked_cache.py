"""Files that are made once, for all processes of a machine, and checked when they are used again.

A file `NAME.EXT` of the cache has an index `NAME.json`, which is written last: the size and the
checksum of the file, what its maker said about it, and the checksum of the index itself. The first
process of a start that needs the file compares it with the index and touches the index; the others,
which have waited for its lock, trust that. A damaged file is named and rebuilt. Imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import xxhash
from filelock import FileLock

from launcher.errors import UserError
from launcher.folders import durable
from launcher.folders.brief import brief
from launcher.folders.json_file import DamagedFile, read_object

BLOCK_BYTES = 1 << 20  # read at a time
SECONDS_BETWEEN_LINES = 5.0
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

Say = Callable[[str], None]
Facts = dict[str, Any]  # what the maker of a file says about it, as JSON


def ensure(
    file: Path,
    make: Callable[[Path], Facts],
    accept: Callable[[Facts], object],
    say: Say = lambda line: None,
    tick: Callable[[], object] = lambda: None,
) -> Facts:
    """The facts about `file`. It is made first if it is missing, and rebuilt if it is damaged.

    Args:
        make: Writes the file to the given path, or no file, and returns the facts.
        accept: Raises ValueError, TypeError or KeyError if facts are not of the expected types.
        say: Receives log lines.
        tick: Is called regularly while the file is read; if it raises, the work stops.

    Raises UserError if the cache cannot be written.
    """
    note = file.with_suffix(".damaged")
    try:
        with lock(file.with_suffix(".lock"), _index(file)):
            facts = _checked(file, accept, say, tick)
            if facts is None:
                facts = _make(file, make)
        # Another process of this start may have found the damage.
        if note.is_file() and note.stat().st_mtime >= _started():
            say(note.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise cache_error(file.parent, error) from error
    return facts


def cache_error(folder: Path, error: OSError) -> UserError:
    """The error to raise if the cache `folder` cannot be written."""
    return UserError(
        f"the cache {error.filename or folder} cannot be written: {error.strerror or error}; free "
        "disk space, or set SHARDWAY_CACHE to a folder that you can write"
    )


@contextmanager
def lock(file: Path, existing: Path) -> Iterator[None]:
    """Let one process at a time make or check something, by a lock on `file`. A cache that cannot
    be written and has what is needed, `existing`, is used without a lock."""
    held = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except OSError as error:
        if error.errno not in READ_ONLY or not existing.exists():
            raise
        yield
        return
    try:
        yield
    finally:
        held.release()


def _index(file: Path) -> Path:
    return file.with_suffix(".json")


def _checked(
    file: Path, accept: Callable[[Facts], object], say: Say, tick: Callable[[], object]
) -> Facts | None:
    """The facts if the file matches its index; None if there is none. A damaged one is told and
    also None."""
    index = _index(file)
    if not os.path.lexists(index):
        return None
    try:
        if (facts := _read_index(index, accept)) is None:
            return None
        if not is_checked(index, file):
            _compare(file, facts, say, tick)
            with suppress(OSError):  # a read-only cache
                os.utime(index)
    except DamagedFile as error:
        note = f"{error}; rebuilt"
        print(note, file=sys.stderr, flush=True)
        file.with_suffix(".damaged").write_text(note, encoding="utf-8")
        return None
    return facts


def is_checked(index: Path, file: Path) -> bool:
    """Whether the index was touched since this process started, and the file not since then."""
    try:
        touched = index.stat().st_mtime
        return touched >= _started() and file.stat().st_mtime < touched
    except OSError:
        return False


def _read_index(index: Path, accept: Callable[[Facts], object]) -> Facts | None:
    """None if it is of an earlier version, which wrote no checksums or not the name of the file."""
    content = read_object(index)
    if "checksum" not in content:
        return None
    if content.pop("checksum") != _checksum_of(content):
        raise DamagedFile(index, "has changed since it was written")
    if "of" not in content:
        return None
    if Path(str(name := content.pop("of"))).stem != index.stem:
        raise DamagedFile(index, f"belongs to {brief(name)}: two files were swapped")
    try:
        accept(content)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFile(index, f"is damaged: {error!r}") from error
    return content


def _compare(file: Path, facts: Facts, say: Say, tick: Callable[[], object]) -> None:
    """Raise DamagedFile if the file is not the one that the index describes."""
    expected = facts["nbytes"]
    if expected is None:
        return
    try:
        size = file.stat().st_size
        if size != expected:
            raise DamagedFile(file, f"has {size} bytes instead of {expected}")
        if _checksum(file, size, say, tick) != facts["xxh3_128"]:
            raise DamagedFile(file, "has changed since it was written")
    except OSError as error:
        raise DamagedFile(file, f"cannot be read: {error.strerror}") from error


def _checksum(file: Path, size: int, say: Say, tick: Callable[[], object]) -> str:
    digest, done, last_line = xxhash.xxh3_128(), 0, time.monotonic()
    block = memoryview(bytearray(BLOCK_BYTES))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(block):
            digest.update(block[:count])
            done += count
            tick()
            if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                say(f"checking {file}: {done / 1e9:.1f} of {size / 1e9:.1f} GB")
    return digest.hexdigest()


def _make(file: Path, make: Callable[[Path], Facts]) -> Facts:
    partial, partial_index = file.with_suffix(".partial"), file.with_suffix(".json.partial")
    try:
        facts = make(partial)
        is_file = partial.is_file()
        facts["nbytes"] = partial.stat().st_size if is_file else None
        facts["xxh3_128"] = _checksum(partial, 0, lambda line: None, int) if is_file else None
        named = {**facts, "of": file.name}  # two files that were swapped agree with their indexes
        text = json.dumps({**named, "checksum": _checksum_of(named)})
        partial_index.write_text(text, encoding="utf-8")
        if is_file:
            durable.replace(partial, file)
        durable.replace(partial_index, _index(file))
    finally:  # an incomplete file must not stay, least of all on a full disk
        partial.unlink(missing_ok=True)
        partial_index.unlink(missing_ok=True)
    return facts


def _checksum_of(facts: Facts) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _started() -> float:
    """When this process started, in seconds since 1970."""
    return psutil.Process().create_time()
