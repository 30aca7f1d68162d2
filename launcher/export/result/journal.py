"""Which files of an unfinished export are whole: a line each, in a file beside its folder.

The first line says which plan it is of. The open file is also the lock of the process that writes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from launcher.errors import UserError

Entry = dict[str, Any]  # bytes, xxh3_128, tensors: name → xxh3_64


def partial_folder(output: Path) -> Path:
    """Where `output` is written before it has its name."""
    return output.absolute().parent / f".{output.name}.partial"


def path_of(aside: Path) -> Path:
    return aside.with_name(aside.name + ".jsonl")


@contextmanager
def opened(aside: Path, identity: str, resume: bool, overwrite: bool) -> Iterator[TextIO]:
    """The journal of a partial folder, new or to be gone on with, for this process alone.

    `identity`: of the plan. Raises UserError when another process or plan has the folder, or when
    it stands and was not asked for.
    """
    stands = aside.exists()
    if stands and not (resume or overwrite):
        raise UserError(
            f"an unfinished export stands in {aside}: --resume goes on with it, --overwrite begins "
            "anew"
        )
    with path_of(aside).open("a+", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {aside}") from None
        if not _is_at(log, path_of(aside)):
            raise UserError(f"another process has just finished {aside}; look at what it wrote")
        aside.mkdir(exist_ok=True)
        log.seek(0)
        begun = log.readline().strip()
        if begun != identity:
            if begun and stands and not overwrite:
                raise UserError(
                    f"{aside} was begun with other sources or options; --overwrite begins anew"
                )
            for path in aside.iterdir():
                path.unlink()
            log.truncate(0)
            note(log, identity)
        yield log


def finished(aside: Path, log: TextIO) -> dict[str, Entry]:
    """The files that the journal says are whole. A last line cut short counts for nothing."""
    log.seek(0)
    found: dict[str, Entry] = {}
    for line in log.readlines()[1:]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        path = aside / entry.pop("name")
        if path.is_file() and path.stat().st_size == entry["bytes"]:
            found[path.name] = entry
    return found


def note(log: TextIO, line: str) -> None:
    """Add a line that a crash will not lose."""
    log.seek(0, os.SEEK_END)
    log.write(line + "\n")
    log.flush()
    os.fsync(log.fileno())


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether `file`, open since before we had its lock, still has its name."""
    return path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
