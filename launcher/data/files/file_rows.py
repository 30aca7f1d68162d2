"""The rows of files, each with its location: JSON, JSON lines, CSV, Parquet, Arrow; of a file, a
folder or a glob. Imports no torch."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.config.schema.data import UTF_8
from launcher.data.files import nulls, text_files
from launcher.data.files.arrow_files import read_arrow, read_parquet
from launcher.data.files.csv_files import read_csv
from launcher.data.files.json_files import RawRow, read_json, read_json_lines
from launcher.data.files.text_files import suffix_of
from launcher.errors import UserError

__all__ = ["RawRow", "find", "read", "suffix_of"]  # two of them are defined in lower modules

# Files that `datasets` and the hub write next to the rows.
METADATA_FILES = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    *("metadata.json", "config.json"),
)
CACHE_PREFIX, CACHE_SUFFIX = "cache-", ".arrow"  # of the results that `datasets` keeps there
MAX_IN_MEMORY_BYTES = 64_000_000  # a larger .json file is read row by row, at a third of the speed
JSON_SUFFIXES = (".json", ".jsonl")
NULL = re.compile(r'"\s*:\s*null')  # in JSON, the null of a key; also in texts that quote JSON
SAMPLED_ROWS = 1024  # which show of most files that their nulls were not added
SCANNED_FILES = 1024  # files of which it is remembered whether their nulls were added


def find(path: str, text: bool = False) -> list[Path]:
    """The files that `data.path` names, sorted by name: a file, or the files of a folder or glob.

    `text` includes files of raw text. Raises UserError if no file is found, or if one has a type
    that cannot be read.
    """
    suffixes = (*READERS, ".txt") if text else tuple(READERS)
    named = Path(path)
    if named.is_dir():
        return _find_in_folder(named, suffixes)
    files = [named] if named.is_file() else _find_glob(path)
    if not files:
        raise UserError(f"data.path={path} cannot be read: {_why_nothing_matches(path)}")
    for file in files:
        if text_files.is_archive(file):
            raise UserError(f"data.path={file} cannot be read; unpack it")
        if suffix_of(file) not in suffixes:
            is_text = suffix_of(file) in (".txt", ".md") and not text
            way_out = "if it is raw text → data=pretrain" if is_text else "convert it"
            if suffix_of(file) == ".md":
                way_out = f"rename it to .txt{', and ' + way_out if is_text else ''}"
            raise UserError(f"data.path={file} is not a {', '.join(suffixes)} file; {way_out}")
    return files


def list_folder(folder: Path, text: bool = False) -> tuple[list[Path], list[Path]]:
    """(the files of `folder` that `find` returns, those that it leaves out because of their type),
    each sorted by name."""
    suffixes = (*READERS, ".txt") if text else tuple(READERS)
    files = sorted(_walk(folder))
    readable = [file for file in files if suffix_of(file) in suffixes]
    return readable, [file for file in files if suffix_of(file) not in suffixes]


def _why_nothing_matches(path: str) -> str:
    if not glob.has_magic(path):
        return "No such file or directory"
    if folders := sorted(glob.glob(path, recursive=True)):
        return f"it matches only folders, such as {folders[0]} → data.path='{folders[0]}/**'"
    return "no file matches"


def _find_glob(pattern: str) -> list[Path]:
    """The files that match, without those that contain no rows and that only a wildcard names."""
    last = Path(pattern).name
    names_it = not glob.has_magic(last) or last.startswith(CACHE_PREFIX)
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)))
    return [each for each in matches if each.is_file() and (names_it or _has_rows(each.name))]


def _find_in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = []
    for file in _walk(folder):
        if text_files.is_archive(file):
            raise UserError(f"data.path={folder} contains {file}, which cannot be read; unpack it")
        found += [file] if suffix_of(file) in suffixes else []
    if not found:
        raise UserError(f"data.path={folder} contains no {', '.join(suffixes)} file")
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    """The files of `folder` that may contain rows. Hidden ones are left out."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            if not name.startswith(".") and _has_rows(name):
                yield Path(parent, name)


def _has_rows(name: str) -> bool:
    """Whether a file with this name may contain rows: it does not describe other files, and it is
    no cache of `datasets`."""
    is_cache = name.startswith(CACHE_PREFIX) and name.endswith(CACHE_SUFFIX)
    return not is_cache and name not in METADATA_FILES and not name.lower().startswith("readme.")


def check(path: Path, encoding: str = UTF_8) -> None:
    """Raises UserError if the start of a file shows that it cannot be read."""
    text_files.check(path, encoding, _expected(path))


def read(path: Path, encoding: str = UTF_8, as_stored: bool = False) -> Iterator[RawRow]:
    """Each row with its location: `file:line` in text formats, otherwise `file[index]`.

    A row that cannot be parsed is yielded as a UserError, because the rows after it may be fine.
    Nulls that Arrow added are removed; `as_stored` keeps those of JSON files, which may need a
    second reading to be recognized. Raises UserError if the file has another format than its
    suffix, or no rows.
    """
    rows = READERS[suffix_of(path)](path, encoding)
    if suffix_of(path) in JSON_SUFFIXES and not as_stored:
        rows = ((location, without_nulls(path, encoding, row)) for location, row in rows)
    return checked_rows(path, encoding, rows)


def checked_rows(path: Path, encoding: str, rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """Yield `rows`, which are read from `path`. Raises UserError if reading fails, or if there are
    no rows."""
    check(path, encoding)
    empty = True
    with text_files.reading(path, encoding):
        for row in rows:
            empty = False
            yield row
    if empty:
        raise UserError(f"data.path={path} contains no {_expected(path)}")


def _expected(path: Path) -> str:
    return "text; add some" if suffix_of(path) == ".txt" else "rows; add at least one"


def without_nulls(path: Path, encoding: str, row: Any, compared: int | None = None) -> Any:
    """A row of a JSON file, without its nulls if Arrow may have added them. `compared`: how many of
    the first rows decide that; None: all."""
    if not nulls.has_nested_null(row):
        return row
    status = path.stat()
    may_be_added = _may_be_added(path, encoding, status.st_size, status.st_mtime_ns, compared)
    return nulls.remove_nulls(row) if may_be_added else row


def removes_nulls(path: Path, encoding: str) -> bool:
    """Whether `read` removes nulls from a JSON file. Most files are decided by their text or their
    first rows."""
    if suffix_of(path) not in JSON_SUFFIXES or not _mentions_null(path, encoding):
        return False
    read_rows = READERS[suffix_of(path)]
    with text_files.reading(path, encoding):
        first_rows = islice(read_rows(path, encoding), SAMPLED_ROWS)
        if not nulls.may_be_added(row for _, row in first_rows):
            return False
        is_by_line = suffix_of(path) == ".jsonl"
        rows = read_json_lines(path, encoding, NULL) if is_by_line else read_rows(path, encoding)
        first = next((row for _, row in rows if nulls.has_nested_null(row)), None)
        return first is not None and without_nulls(path, encoding, first) is not first


@lru_cache(maxsize=SCANNED_FILES)
def _may_be_added(
    path: Path, encoding: str, size: int, modified_ns: int, compared: int | None
) -> bool:
    """Whether the nulls of a JSON file may come from Arrow; size and time tell a changed file."""
    rows = islice(READERS[suffix_of(path)](path, encoding), compared)
    return nulls.may_be_added(row for _, row in rows)


def _mentions_null(path: Path, encoding: str) -> bool:
    end = ""
    with text_files.reading(path, encoding), text_files.open_text(path, encoding) as file:
        while text := file.read(text_files.BLOCK_BYTES):
            if NULL.search(end + text):
                return True
            end = text[-text_files.BLOCK_BYTES // 2 :]
    return False


READERS: dict[str, Callable[[Path, str], Iterator[RawRow]]] = {
    ".json": lambda path, encoding: read_json(path, encoding, MAX_IN_MEMORY_BYTES),
    ".jsonl": read_json_lines,
    ".csv": read_csv,
    ".parquet": lambda path, encoding: read_parquet(path),
    ".arrow": lambda path, encoding: read_arrow(path),
}
