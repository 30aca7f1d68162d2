"""The journal of an unfinished export: a file beside its folder with one line for each finished
file.

The first line is the identity of the plan. The open journal is also a lock: only one process writes
an export.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from launcher.errors import UserError

Entry = dict[str, Any]  # bytes, xxh3_128, tensors: name → xxh3_64


def partial_folder(output: Path) -> Path:
    """The folder in which `output` is written before it is renamed."""
    return output.absolute().parent / f".{output.name}.partial"


def journal_path(partial: Path) -> Path:
    """The journal of a partial folder."""
    return partial.with_name(partial.name + ".jsonl")


@contextmanager
def open_journal(partial: Path, identity: str, resume: bool, overwrite: bool) -> Iterator[TextIO]:
    """Create the partial folder and its journal, or open them again, and lock them.

    `identity`: of the plan. Raises UserError if another process is writing the folder, if it
    belongs to another plan, or if it exists and neither `resume` nor `overwrite` is set.
    """
    exists = partial.exists()
    if exists and not (resume or overwrite):
        raise UserError(
            f"there is an unfinished export in {partial}: --resume continues it, --overwrite "
            "starts from scratch"
        )
    with journal_path(partial).open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {partial}") from None
        if not _is_still_at(journal, journal_path(partial)):
            raise UserError(f"another process has just finished {partial}; check what it wrote")
        partial.mkdir(exist_ok=True)
        journal.seek(0)
        previous = journal.readline().strip()
        if previous != identity:
            if previous and exists and not overwrite:
                raise UserError(
                    f"{partial} was started with other sources or options; --overwrite starts from "
                    "scratch"
                )
            shutil.rmtree(partial)
            partial.mkdir()
            journal.truncate(0)
            append_line(journal, identity)
        yield journal


def finished_files(partial: Path, journal: TextIO) -> dict[str, Entry]:
    """The finished files that the journal lists. An incomplete last line is ignored."""
    journal.seek(0)
    files: dict[str, Entry] = {}
    for line in journal.readlines()[1:]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        path = partial / entry.pop("name")
        if path.is_file() and path.stat().st_size == entry["bytes"]:
            files[path.name] = entry
    return files


def append_line(journal: TextIO, line: str) -> None:
    """Add a line and flush it to the disk, so that a crash cannot lose it."""
    journal.seek(0, os.SEEK_END)
    journal.write(line + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _is_still_at(file: TextIO, path: Path) -> bool:
    """Whether `file` is still the one at `path`: it was opened before this process had its lock."""
    return path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
