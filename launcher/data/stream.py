"""Rows that are tokenised when a step asks for them, for data too large to be tokenised before.

A file is gone through once, for the places where its rows begin. From then on any row is read in
O(1), so training resumes at any step without skipping through the data, and every rank finds the
same rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from launcher import paths
from launcher.config.data import HUB
from launcher.data import files
from launcher.data.dataset import Row, key
from launcher.data.tokenise import Tokeniser
from launcher.errors import UserError

KEPT_ROWS = 16_384  # tokenised rows: a step asks for a row's length and then for the row
READ_AT_ONCE = 1 << 24


class Table(Protocol):
    """The rows of a file by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> tuple[str, Any]:
        """Its place and the row as it is stored."""


class Streamed:
    """The rows of sources, one source behind the other. A row that cannot be learnt from is empty
    (or, with data.on_bad_row=fail, the end of the run)."""

    def __init__(self, tokenisers: Sequence[Tokeniser]) -> None:
        self._tables: list[tuple[Tokeniser, Table]] = [
            (each, table) for each in tokenisers for table in tables(each)
        ]
        self._begins = np.cumsum([0, *(len(table) for _, table in self._tables)])
        self.skipped = 0
        self._made = functools.lru_cache(maxsize=KEPT_ROWS)(self._make)

        sizes = [f"{len(table)}".encode() for _, table in self._tables]
        self.fingerprint = " ".join(key(each, sizes) for each in tokenisers)  # content: by its size

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
        batch = tokeniser([(place, stored)] if stored != "" else [])
        self.skipped += len(batch.bad)
        end = int(batch.lengths[0]) if len(batch.lengths) else 0
        return batch.ids[:end], batch.trained[:end]


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
    if file.suffix in (".jsonl", ".txt"):
        return Lines(file)
    if file.suffix == ".arrow":
        return ArrowRows(file)
    raise UserError(
        f"data.streaming=true: the rows of {file} cannot be found by number; convert it to .jsonl "
        "or .arrow → data.streaming=false"
    )


class Lines:
    """A .jsonl file, or a .txt file by line. Empty lines are no rows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._begins = _line_starts(file)
        self._opened = file.open("rb")

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, row: int) -> tuple[str, Any]:
        begin, end = int(self._begins[row]), int(self._begins[row + 1])
        self._opened.seek(begin)
        place = f"{self.file} (byte {begin})"
        try:
            line = self._opened.read(end - begin).decode("utf-8-sig")
            if self.file.suffix == ".txt" or not line.strip():
                return place, line.rstrip("\r\n")
            return place, json.loads(line)
        except ValueError as error:
            return place, UserError(f"{place} is not JSON in UTF-8: {error}")


def _line_starts(file: Path) -> NDArray[np.int64]:
    """The bytes at which lines that are not empty begin, and where the last one ends. Kept in the
    cache for the file as it is now, by size and time."""
    about = file.stat()
    key = xxhash.xxh3_128_hexdigest(
        f"{file.absolute()} {about.st_size} {about.st_mtime_ns}".encode()
    )
    kept = paths.cache() / "lines" / f"{key}.npy"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(f".{xxhash.xxh3_64_hexdigest(np.random.bytes(8))}.npy")
        np.save(aside, _find_lines(file))
        aside.replace(kept)
    found: NDArray[np.int64] = np.load(kept, mmap_mode="r")
    if len(found) < 2:
        raise UserError(f"data.path={file} holds no rows; give it at least one")
    return found


def _find_lines(file: Path) -> NDArray[np.int64]:
    ends, returns = [], []  # behind each line feed, and whether a carriage return is before it
    at, before = 0, b""
    with file.open("rb") as opened:
        while block := opened.read(READ_AT_ONCE):
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

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, row: int) -> tuple[str, Any]:
        number = int(np.searchsorted(self._begins, row, side="right")) - 1
        (found,) = self._batches[number].slice(row - int(self._begins[number]), 1).to_pylist()
        return f"{self.file}[{row}]", found
