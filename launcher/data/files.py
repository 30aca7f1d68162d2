"""Rows of files, with the place of each: JSON, JSON lines, CSV, Parquet, Arrow; a file, a folder, a
glob. No torch."""

from __future__ import annotations

import codecs
import csv
import glob
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import UserError

Rows = Iterator[tuple[str, Any]]
NOT_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json")  # `datasets` writes them beside
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")
ROWS_AT_ONCE = 1024  # of Parquet and Arrow, as Python's objects
HELD_WHOLE_BYTES = 64_000_000  # a larger .json is read row by row, at a third of the speed


def find(path: str, text: bool = False) -> list[Path]:
    """The files that `data.path` names, in order of name: one, those of a folder, or of a pattern;
    with `text` those of raw text too.

    Raises UserError when there is none, or one of a kind that is not read.
    """
    kinds = (*READERS, ".txt") if text else tuple(READERS)
    named = Path(path)
    if named.is_dir():
        return _of_folder(named, kinds)
    found = [named] if named.is_file() else sorted(map(Path, glob.glob(path, recursive=True)))
    found = [each for each in found if each.is_file()]
    if not found:
        raise UserError(f"data.path={path} cannot be read: No such file or directory")
    for each in found:
        if kind_of(each) not in kinds:
            hint = "; raw text is data=pretrain" if kind_of(each) == ".txt" else ""
            kind = f"{', '.join(kinds)} file"
            raise UserError(f"data.path={each} is no {kind}; rename or convert it{hint}")
    return found


def kind_of(file: Path) -> str:
    return file.suffix.lower()


def _of_folder(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    found = []
    for place, _, names in os.walk(folder, followlinks=True):
        files = [Path(place, name) for name in names if name not in NOT_ROWS]
        found += [file for file in files if kind_of(file) in kinds]
        packed = [file for file in files if kind_of(file) in PACKED]
        if packed:
            raise UserError(f"data.path={folder} holds {packed[0]}, which is not read; unpack it")
    if not found:
        raise UserError(f"data.path={folder} holds no {', '.join(kinds)} file")
    return sorted(found)


def read(path: Path) -> Rows:
    """Each row with its place: `file:line` of text, `file[index]` of others. A row that is none is
    the UserError that says so: others may follow.

    Raises UserError where the file is not what its name says, or holds nothing.
    """
    return readable(path, READERS[kind_of(path)](path), "rows; give it at least one")


def readable(path: Path, rows: Rows, wanted: str) -> Rows:
    """`rows` of `path`. Raises UserError where it cannot be read on, or where there are none."""
    empty = True
    try:
        for place_and_row in rows:
            empty = False
            yield place_and_row
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={path} is not UTF-8 ({error}); convert it") from error
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror or error}") from error
    if empty:
        raise UserError(f"data.path={path} holds no {wanted}")


def _json_lines(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as text:  # some editors put a byte order mark first
        for number, line in enumerate(text, start=1):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield place, UserError(f"{place} is not JSON: {error}")


def _json_array(path: Path) -> Rows:
    if path.stat().st_size > HELD_WHOLE_BYTES:
        yield from _json_stream(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; one object a line is .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a list of rows, not {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def _json_stream(path: Path) -> Rows:
    """Row by row: as Python objects a large file takes five times its size."""
    import ijson

    index = 0
    with path.open("rb") as file:
        begin = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
        if not begin.startswith(b"["):
            raise UserError(f"{path} must hold a list of rows; one object a line is .jsonl")
        file.seek(0)
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            for row in ijson.items(file, "item", use_float=True):
                yield f"{path}[{index}]", row
                index += 1
        except ijson.JSONError as error:
            raise UserError(f"{path}[{index}] is not JSON: {error}") from error


def _csv(path: Path) -> Rows:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                uneven = None in row or None in row.values()
                said = f"{place} has not as many fields as the first line has names"
                yield place, UserError(said) if uneven else row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def _parquet(path: Path) -> Rows:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _batches(path, file.iter_batches(batch_size=ROWS_AT_ONCE))
    except ArrowException as error:
        raise UserError(f"{path} is not Parquet: {error}") from error


def _arrow(path: Path) -> Rows:
    return _batches(path, iter(arrow_batches(path)))


def arrow_batches(path: Path) -> list[Any]:
    """The record batches of a file or a stream (`datasets` writes streams), memory-mapped.

    Raises UserError when it is neither.
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


def _batches(path: Path, batches: Iterator[Any]) -> Rows:
    index = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, ROWS_AT_ONCE):
            for row in batch.slice(begin, ROWS_AT_ONCE).to_pylist():
                yield f"{path}[{index}]", without_nulls(row)
                index += 1


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives every struct of a column the fields of all: a call's arguments those of others,
    as nulls. They are taken out, inside of columns."""
    return {name: _pruned(value) for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(each) for key, each in value.items() if each is not None}
    return [_pruned(each) for each in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json_array,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
