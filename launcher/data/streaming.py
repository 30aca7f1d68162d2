"""Rows that are tokenized when a step needs them, for data too large to be tokenized in advance.

Each file is read once to find the positions where its rows begin. After that, any row is read
directly, so training resumes at any step without reading the data before it, and all ranks see the
same rows.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from launcher.config.schema.data import SourceConfig
from launcher.data.dataset import Row, Say, cache_key
from launcher.data.files import file_rows
from launcher.data.files.arrow_files import open_record_batches
from launcher.data.files.file_rows import RawRow
from launcher.data.files.nulls import remove_nulls
from launcher.data.files.source_files import check_streaming, encoding_content, find_files
from launcher.data.files.text_files import codec_name, is_utf_8
from launcher.data.source import TextPart
from launcher.data.summary import UNENDED
from launcher.data.tokenize import RowTokenizer, TokenBatch
from launcher.errors import UserError
from launcher.folders import checked_cache, paths

CACHED_ROWS = 4_096  # tokenized rows in memory: a step needs a row's length first, then the row
COMPARED_ROWS = 10_000  # decide whether nulls are removed; a step cannot wait for all of them
LOGGED_ERRORS = 20  # messages of bad rows in the log; more bad rows are only counted
BLOCK_BYTES = 1 << 24  # read at a time


class IndexedFile(Protocol):
    """The rows of a file by number."""

    content: str  # a hash that changes when the file does

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> RawRow:
        """The location and the raw row, which is None for a blank line."""


class StreamedRows:
    """The rows of all sources, concatenated in the order of the sources.

    A row that cannot be trained on is empty; with data.on_bad_row=fail it raises UserError.
    """

    def __init__(self, row_tokenizers: Sequence[RowTokenizer], say: Say) -> None:
        self._files: list[tuple[RowTokenizer, IndexedFile]] = []
        sizes, keys = [0], []
        for row_tokenizer in row_tokenizers:
            max_rows = row_tokenizer.source.max_rows
            remaining = sys.maxsize if max_rows is None else max_rows
            files = open_files(row_tokenizer.source, say)
            content = [f"{file.content}".encode() for file in files]
            content += encoding_content(row_tokenizer.source)
            keys.append(cache_key(row_tokenizer, content))
            for file in files:
                self._files.append((row_tokenizer, file))
                sizes.append(min(remaining, len(file)))
                remaining -= sizes[-1]
        self._first_rows = np.cumsum(sizes)  # number of each file's first row, and the total
        self.skipped = 0  # bad rows so far
        self.lost = 0  # rows that were left out or cut so far
        self._said: set[str] = set()  # notes on rows, each of which is said once
        self._say = say
        self._cached = functools.lru_cache(maxsize=CACHED_ROWS)(self._tokenize)
        self.fingerprint = " ".join(keys)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getitem__(self, row: int) -> Row:
        return self._cached(row)

    def length(self, row: int) -> int:
        return len(self._cached(row)[0])

    def _tokenize(self, row: int) -> Row:
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        row_tokenizer, file = self._files[number]
        location, raw_row = file[row - int(self._first_rows[number])]
        batch = row_tokenizer([(location, raw_row)] if raw_row is not None else [])
        for message in batch.errors:
            self.skipped += 1
            if self.skipped <= LOGGED_ERRORS:
                self._say(f"skipped: {message}")
        self._say_lost(location, row_tokenizer, batch)
        notes = [*batch.notes, *[UNENDED] * bool(batch.unended)]
        for note in (note for note in notes if note not in self._said):
            self._said.add(note)
            self._say(f"data: {note}")
        if len(batch.lengths) > 1:
            raise UserError(
                f"{location}: data.streaming=true needs one row per conversation, and this chat "
                "template makes one of each answer → data.train_on=last_answer, or "
                "data.streaming=false"
            )
        return batch.ids, batch.loss_mask

    def _say_lost(self, location: str, row_tokenizer: RowTokenizer, batch: TokenBatch) -> None:
        """Log a row that is left out or cut, as the first of them are."""
        lost = batch.too_long + batch.dropped + batch.truncated
        self.lost += lost
        if lost and self.lost <= LOGGED_ERRORS:
            length = f"data.max_length={row_tokenizer.config.max_length}"
            fate = (
                f"left out, longer than {length}"
                if batch.too_long
                else f"cut at {length}"
                if batch.truncated and not batch.dropped
                else f"left out, no answer within {length}"
            )
            self._say(f"{location}: {fate}")


def open_files(source: SourceConfig, say: Say = lambda line: None) -> list[IndexedFile]:
    """The files of a source. `say` receives log lines about the cache.

    Raises UserError for a format whose rows cannot be read by number.
    """
    check_streaming(source)
    return [_open_file(file, source.encoding, say) for file in find_files(source)]


def _open_file(file: Path, encoding: str, say: Say) -> IndexedFile:
    file_rows.check(file, encoding)
    is_arrow = file_rows.suffix_of(file) == ".arrow"
    return ArrowFile(file, say) if is_arrow else LineFile(file, encoding, say)


class LineFile:
    """A .jsonl file, or a .txt file by line. Empty lines are not counted; a line of spaces is an
    empty row."""

    def __init__(self, file: Path, encoding: str, say: Say) -> None:
        self.file = file
        self._encoding = encoding
        self._is_text = file_rows.suffix_of(file) == ".txt"
        self._line_starts, self.content = _line_starts(file, say)

    def __len__(self) -> int:
        return len(self._line_starts) - 1

    def __getitem__(self, number: int) -> RawRow:
        begin, end = self._line_starts[number : number + 2].tolist()
        location = f"{self.file} (byte {begin})"
        with self.file.open("rb") as opened:
            opened.seek(begin)
            line = opened.read(end - begin)
        try:
            text = line.decode(codec_name(self._encoding))
            if not text.strip():
                return location, None
            row = TextPart(text.rstrip("\r\n")) if self._is_text else json.loads(text)
        except (ValueError, RecursionError) as error:
            name = "UTF-8" if is_utf_8(self._encoding) else self._encoding
            is_other = isinstance(error, UnicodeDecodeError)
            way_out = " → data.encoding=NAME" if is_other else ""
            return location, UserError(f"{location} is not JSON in {name}: {error}{way_out}")
        return location, file_rows.without_nulls(self.file, self._encoding, row, COMPARED_ROWS)


def _line_starts(file: Path, say: Say) -> tuple[NDArray[np.int64], str]:
    """The byte positions where the lines that are not empty begin, with the end of the file, and a
    hash of the file. Cached."""

    def make(partial: Path) -> dict[str, str]:
        digest = xxhash.xxh3_128()
        with partial.open("wb") as out:
            np.save(out, _find_line_starts(file, digest))
        return {"content": digest.hexdigest()}

    cached = _cached_file(file, ".npy")
    content = _content_of(checked_cache.ensure(cached, make, _content_of, say))
    starts: NDArray[np.int64] = np.load(cached, mmap_mode="r")
    if len(starts) < 2:
        raise UserError(f"data.path={file} contains no rows; add at least one")
    return starts, content


def _content_hash(file: Path, say: Say) -> str:
    """A hash of the whole file. Cached."""

    def make(partial: Path) -> dict[str, str]:
        digest = xxhash.xxh3_128()
        with file.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
        return {"content": digest.hexdigest()}

    cached = _cached_file(file, ".hash")
    return _content_of(checked_cache.ensure(cached, make, _content_of, say))


def _cached_file(file: Path, suffix: str) -> Path:
    """The name of a file of the cache about `file`, by its path, size and modification time."""
    status = file.stat()
    name = f"{file.absolute()} {status.st_size} {status.st_mtime_ns}"
    return paths.cache() / "lines" / f"{xxhash.xxh3_128_hexdigest(name.encode())}{suffix}"


def _content_of(facts: Mapping[str, Any]) -> str:
    if not isinstance(content := facts["content"], str):
        raise TypeError(content)
    return content


def _find_line_starts(file: Path, digest: xxhash.xxh3_128) -> NDArray[np.int64]:
    """Where the lines that are not empty begin, with the end of the file; updates `digest`."""
    ends = []  # positions after each line feed
    has_return = []  # whether a carriage return is before it
    position, previous = 0, b""
    with file.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            digest.update(block)
            with_previous = np.frombuffer(previous.rjust(1) + block, np.uint8)
            feeds = np.flatnonzero(with_previous[1:] == ord("\n"))
            ends.append(feeds + position + 1)
            has_return.append(with_previous[feeds] == ord("\r"))
            position += len(block)
            previous = block[-1:]
    bounds = np.concatenate([[0], *ends, [position]]).astype(np.int64)
    lengths = np.diff(bounds)
    lengths[:-1] -= np.concatenate([np.empty(0, np.bool_), *has_return])
    lengths[-1] += 1  # the last line has no line feed, or is empty
    return np.concatenate([bounds[:-1][lengths > 1], [position]])


class ArrowFile:
    """A file or a stream of record batches, memory-mapped."""

    def __init__(self, file: Path, say: Say) -> None:
        self.file = file
        self._batches = open_record_batches(file)
        self._first_rows = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.content = f"{file.stat().st_size} {_content_hash(file, say)}"

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getitem__(self, number: int) -> RawRow:
        index = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        batch = self._batches[index].slice(number - int(self._first_rows[index]), 1)
        (row,) = batch.to_pylist()
        return f"{self.file}[{number}]", remove_nulls(row)
