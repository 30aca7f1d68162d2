"""Rows that are tokenised when a step asks for them, for data too large to be tokenised before.

A file is gone through once, for the places where its rows begin. From then on any row is read in
O(1), so training resumes at any step without skipping through the data, and every rank finds the
same rows.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from filelock import FileLock
from numpy.typing import NDArray

from launcher import paths
from launcher.config.data import HUB
from launcher.data import files
from launcher.data.dataset import Row, key, unwritable
from launcher.data.source import TextPart
from launcher.data.tokenise import Tokeniser
from launcher.errors import UserError

KEPT_ROWS = 4_096  # tokenised rows: a step asks for a row's length and then for the row
SAID_ROWS = 20  # that are bad: more are only counted
READ_AT_ONCE = 1 << 24


class Table(Protocol):
    """The rows of a file by number."""

    content: str  # changes when the file does

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> tuple[str, Any]:
        """Its place and the row as it is stored; None where nothing is."""


class Streamed:
    """The rows of sources, one source behind the other. A row that cannot be learnt from is empty
    (or, with data.on_bad_row=fail, the end of the run)."""

    def __init__(self, tokenisers: Sequence[Tokeniser], say: Callable[[str], None]) -> None:
        self._tables: list[tuple[Tokeniser, Table]] = []
        sizes = [0]
        for each in tokenisers:
            room = sys.maxsize if each.source.max_rows is None else each.source.max_rows
            for table in tables(each):
                self._tables.append((each, table))
                sizes.append(min(room, len(table)))
                room -= sizes[-1]
        self._begins = np.cumsum(sizes)
        self.skipped = 0
        self._say = say
        self._made = functools.lru_cache(maxsize=KEPT_ROWS)(self._make)
        content = [f"{table.content}".encode() for _, table in self._tables]
        self.fingerprint = " ".join(key(each, content) for each in tokenisers)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, row: int) -> Row:
        return self._made(row)

    def length(self, row: int) -> int:
        return len(self._made(row)[0])

    def _make(self, row: int) -> Row:
        number = int(np.searchsorted(self._begins, row, side="right")) - 1
        tokeniser, table = self._tables[number]
        place, stored = table[row - int(self._begins[number])]
        batch = tokeniser([(place, stored)] if stored is not None else [])
        for sentence in batch.bad:
            self.skipped += 1
            if self.skipped <= SAID_ROWS:
                self._say(f"skipped: {sentence}")
        if len(batch.lengths) > 1:
            raise UserError(
                f"{place}: data.streaming=true takes a conversation for one row, and this chat "
                "template makes one of each answer → data.train_on=last_answer, or "
                "data.streaming=false"
            )
        return batch.ids, batch.trained


def tables(tokeniser: Tokeniser) -> list[Table]:
    """The files of a source. Raises UserError for a kind whose rows cannot be found by number."""
    path = tokeniser.source.path or ""
    if path.startswith(HUB):
        raise UserError(
            f"data.streaming=true reads files, and data.path={path} is downloaded whole → "
            "data.streaming=false"
        )
    return [_table(file) for file in files.find(path, tokeniser.source.format == "text")]


def _table(file: Path) -> Table:
    if files.kind_of(file) in (".jsonl", ".txt"):
        return Lines(file)
    if files.kind_of(file) == ".arrow":
        return ArrowRows(file)
    raise UserError(
        f"data.streaming=true: the rows of {file} cannot be found by number; convert it to .jsonl "
        "or .arrow → data.streaming=false"
    )


class Lines:
    """A .jsonl file, or a .txt file by line. A line of spaces is an empty row."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._text = files.kind_of(file) == ".txt"
        self._begins, self.content = _line_starts(file)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, row: int) -> tuple[str, Any]:
        begin, end = int(self._begins[row]), int(self._begins[row + 1])
        place = f"{self.file} (byte {begin})"
        try:
            with self.file.open("rb") as opened:
                opened.seek(begin)
                line = opened.read(end - begin).decode("utf-8-sig")
            if not line.strip():
                return place, None
            return place, TextPart(line.rstrip("\r\n")) if self._text else json.loads(line)
        except (ValueError, RecursionError) as error:
            return place, UserError(f"{place} is not JSON in UTF-8: {error}")


def _line_starts(file: Path) -> tuple[NDArray[np.int64], str]:
    """The bytes at which lines that are not empty begin and where the last one ends, and a hash of
    the file. Kept in the cache for the file as it is now, by size and time."""
    about = file.stat()
    named = f"{file.absolute()} {about.st_size} {about.st_mtime_ns}"
    kept = paths.cache() / "lines" / f"{xxhash.xxh3_128_hexdigest(named.encode())}.npy"
    try:
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(kept.with_suffix(".lock")):
                if not kept.is_file():  # else another rank has made it meanwhile
                    _keep_lines(file, kept)
    except OSError as error:
        raise unwritable(kept.parent, error) from error
    found: NDArray[np.int64] = np.load(kept, mmap_mode="r")
    if len(found) < 2:
        raise UserError(f"data.path={file} holds no rows; give it at least one")
    return found, kept.with_suffix(".hash").read_text()


def _keep_lines(file: Path, kept: Path) -> None:
    aside = kept.with_suffix(".partial")
    digest = xxhash.xxh3_128()
    try:
        with aside.open("wb") as out:
            np.save(out, _find_lines(file, digest))
        kept.with_suffix(".hash").write_text(digest.hexdigest())
        aside.replace(kept)
    finally:
        aside.unlink(missing_ok=True)


def _find_lines(file: Path, digest: Any) -> NDArray[np.int64]:
    ends, returns = [], []  # behind each line feed, and whether a carriage return is before it
    at, before = 0, b""
    with file.open("rb") as opened:
        while block := opened.read(READ_AT_ONCE):
            digest.update(block)
            with_before = np.frombuffer(before.rjust(1) + block, np.uint8)
            feeds = np.flatnonzero(with_before[1:] == ord("\n"))
            ends.append(feeds + at + 1)
            returns.append(with_before[feeds] == ord("\r"))
            at += len(block)
            before = block[-1:]
    places = np.concatenate([[0], *ends, [at]]).astype(np.int64)
    lengths = np.diff(places)
    lengths[:-1] -= np.concatenate([np.empty(0, np.bool_), *returns])
    lengths[-1] += 1  # the last line has no line feed, or is none
    return np.concatenate([places[:-1][lengths > 1], [at]])


class ArrowRows:
    """A file or a stream of record batches, memory-mapped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._batches = files.arrow_batches(file)
        self._begins = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        with file.open("rb") as opened:
            begin = opened.read(READ_AT_ONCE)
        self.content = f"{file.stat().st_size} {xxhash.xxh3_128_hexdigest(begin)}"

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, row: int) -> tuple[str, Any]:
        number = int(np.searchsorted(self._begins, row, side="right")) - 1
        (found,) = self._batches[number].slice(row - int(self._begins[number]), 1).to_pylist()
        return f"{self.file}[{row}]", files.without_nulls(found)
