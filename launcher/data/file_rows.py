"""The rows of files, each with its location: JSON, JSON lines, CSV, Parquet, Arrow; of a file, a
folder or a glob. Imports no torch."""

from __future__ import annotations

import codecs
import csv
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

RawRow = tuple[str, Any]  # location (file:line or file[index]), row as it is stored in the file
# JSON files that `datasets` writes next to its rows.
METADATA_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip")
CHUNK_ROWS = 1024  # rows of Parquet and Arrow files that are converted to Python objects at a time
MAX_IN_MEMORY_BYTES = 64_000_000  # a larger .json file is read row by row, at a third of the speed


def find(path: str, text: bool = False) -> list[Path]:
    """The files that `data.path` names, sorted by name: a file, or the files of a folder or glob.

    `text` includes files of raw text. Raises UserError if no file is found, or if one has a type
    that cannot be read.
    """
    suffixes = (*READERS, ".txt") if text else tuple(READERS)
    named = Path(path)
    if named.is_dir():
        return _find_in_folder(named, suffixes)
    matches = [named] if named.is_file() else sorted(map(Path, glob.glob(path, recursive=True)))
    files = [file for file in matches if file.is_file()]
    if not files:
        raise UserError(f"data.path={path} cannot be read: No such file or directory")
    for file in files:
        if suffix_of(file) not in suffixes:
            hint = "; raw text is data=pretrain" if suffix_of(file) == ".txt" else ""
            raise UserError(
                f"data.path={file} is not a {', '.join(suffixes)} file; rename or convert it{hint}"
            )
    return files


def suffix_of(file: Path) -> str:
    """The suffix of the file name in lower case, with its dot."""
    return file.suffix.lower()


def _find_in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        files = [Path(parent, name) for name in names if name not in METADATA_FILES]
        found += [file for file in files if suffix_of(file) in suffixes]
        compressed = [file for file in files if suffix_of(file) in COMPRESSED_SUFFIXES]
        if compressed:
            raise UserError(
                f"data.path={folder} contains {compressed[0]}, which cannot be read; unpack it"
            )
    if not found:
        raise UserError(f"data.path={folder} contains no {', '.join(suffixes)} file")
    return sorted(found)


def read(path: Path) -> Iterator[RawRow]:
    """Each row with its location: `file:line` in text formats, otherwise `file[index]`.

    A row that cannot be parsed is yielded as a UserError, because the rows after it may be fine.
    Raises UserError if the file has another format than its suffix, or no rows.
    """
    return checked_rows(path, READERS[suffix_of(path)](path), "rows; add at least one")


def checked_rows(path: Path, rows: Iterable[RawRow], expected: str) -> Iterator[RawRow]:
    """Yield `rows`, which are read from `path`.

    Raises UserError if reading fails, or if there are no rows: `path` "contains no `expected`".
    """
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={path} is not UTF-8 ({error}); convert it") from error
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror or error}") from error
    if empty:
        raise UserError(f"data.path={path} contains no {expected}")


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig") as file:  # some editors put a byte order mark first
        for number, line in enumerate(file, start=1):
            if line.strip():
                location = f"{path}:{number}"
                try:
                    yield location, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield location, UserError(f"{location} is not JSON: {error}")


def _read_json_list(path: Path) -> Iterator[RawRow]:
    if path.stat().st_size > MAX_IN_MEMORY_BYTES:
        yield from _stream_json_list(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; one object per line is .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} must contain a list of rows, not {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def _stream_json_list(path: Path) -> Iterator[RawRow]:
    """Row by row: as Python objects, a large file takes five times its size."""
    import ijson

    index = 0
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
        if not start.startswith(b"["):
            raise UserError(f"{path} must contain a list of rows; one object per line is .jsonl")
        file.seek(0)
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            for row in ijson.items(file, "item", use_float=True):
                yield f"{path}[{index}]", row
                index += 1
        except ijson.JSONError as error:
            raise UserError(f"{path}[{index}] is not JSON: {error}") from error


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                location = f"{path}:{reader.line_num}"
                uneven = None in row or None in row.values()
                message = f"{location} does not have as many fields as the first line has names"
                yield location, UserError(message) if uneven else row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[RawRow]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _batch_rows(path, file.iter_batches(batch_size=CHUNK_ROWS))
    except ArrowException as error:
        raise UserError(f"{path} is not Parquet: {error}") from error


def _read_arrow(path: Path) -> Iterator[RawRow]:
    return _batch_rows(path, iter(open_record_batches(path)))


def open_record_batches(path: Path) -> list[pa.RecordBatch]:
    """The record batches of an Arrow file or stream (`datasets` writes streams), memory-mapped.

    Raises UserError if `path` is neither.
    """
    from pyarrow import ArrowException, ipc, memory_map

    source = memory_map(str(path))
    try:
        reader = ipc.open_file(source)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except ArrowException:
        source.seek(0)
    try:
        return list(ipc.open_stream(source))
    except ArrowException as error:
        raise UserError(f"{path} is not Arrow: {error}") from error


def _batch_rows(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[RawRow]:
    index = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, CHUNK_ROWS):
            for row in batch.slice(begin, CHUNK_ROWS).to_pylist():
                yield f"{path}[{index}]", remove_nulls(row)
                index += 1


def remove_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Remove nulls inside columns.

    Arrow gives every struct of a column the fields of all its structs: a tool call gets the
    arguments of the others, as nulls.
    """
    return {name: _remove_nested_nulls(value) for name, value in row.items()}


def _remove_nested_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _remove_nested_nulls(v) for k, v in value.items() if v is not None}
    return [_remove_nested_nulls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".json": _read_json_list,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
