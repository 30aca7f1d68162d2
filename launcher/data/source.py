"""What `data=` names: conversations or raw texts, from one source or several. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.schema.data import HUB, DataConfig, SourceConfig
from launcher.data import dataset_info, file_rows
from launcher.data.file_rows import RawRow
from launcher.data.row_formats import Conversation, read_text, to_conversation
from launcher.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

CHECKED_AT_SUBMIT_BYTES = 32_000_000  # about a third of a second of reading
CHECKED_AT_SUBMIT_ROWS = 1_000  # of larger files

PART_CHARACTERS = 1 << 16  # size of the parts in which a long text is read


@dataclass(frozen=True)
class TextPart:
    """A raw text, or a part of one that is too long to be read at once."""

    text: str
    is_first: bool = True
    is_last: bool = True


ParsedRow = Conversation | TextPart


def resolve_sources(config: DataConfig) -> dict[str, SourceConfig]:
    """The sources to train on, by name. Raises UserError for an invalid data.dataset_info."""
    if config.dataset_info:
        text = config.format == "text"
        return dataset_info.read(config.dataset_info, config.name, text)
    return config.sources or {config.name: config}


def evaluation_config(config: DataConfig) -> DataConfig:
    """The settings that read `data.eval_path` alone, in the format of `data.path` or, if they all
    have the same one, of the sources."""
    formats = {source.format for source in resolve_sources(config).values()}
    format = formats.pop() if len(formats) == 1 else "auto"
    single = replace(config, sources={}, dataset_info=None, max_rows=None, streaming=False)
    return replace(single, path=config.eval_path, format=format)


def iter_rows(source: SourceConfig, by_line: bool) -> Iterator[RawRow]:
    """Each row as it is stored, with its location. A row of a .txt file is a TextPart (`by_line`: a
    line).

    Raises UserError if a file cannot be read.
    """
    path, text = source.path or "", source.format == "text"
    rows = _hub_rows(source) if path.startswith(HUB) else _file_rows(path, text, by_line)
    for number, row in enumerate(rows):
        if number == source.max_rows:
            break
        yield row


def parse_row(source: SourceConfig, location: str, row: Any) -> ParsedRow:
    """The conversation or text of a raw row. Raises UserError for a bad row."""
    if isinstance(row, UserError):
        raise row
    if isinstance(row, TextPart) and source.format == "text":
        return row
    renamed = rename_columns(location, row, source.columns)
    if source.format == "text":
        return TextPart(read_text(location, renamed, "text"))
    return to_conversation(location, renamed, source.format, source.tags)


def iter_content(source: SourceConfig) -> Iterator[bytes]:
    """Bytes that change when the data of `source` changes, but not with file names or dates."""
    path = source.path or ""
    if path.startswith(HUB):
        # The fingerprint covers the content of the files and how the data set was made from them.
        yield str(_load_hub(source)._fingerprint).encode()
        return
    for file in file_rows.find(path, source.format == "text"):
        yield f"{file.suffix} {file.stat().st_size}".encode()
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                yield block


def rename_columns(location: str, row: Any, columns: dict[str, str]) -> dict[str, Any]:
    """`row` with the columns that `columns` (field: column) lists renamed to their fields."""
    if not isinstance(row, dict):
        raise UserError(f"{location} is {type(row).__name__}, not an object with named fields")
    fields = {field: row[name] for field, name in columns.items() if name in row}
    return {key: value for key, value in row.items() if key not in columns.values()} | fields


def find_problems(config: DataConfig) -> list[str]:
    """The problems with the data that a short check finds.

    Only the first thousand rows of large files are read. The other rows are checked when they are
    tokenized, with the same messages.
    """
    try:
        sources = list(resolve_sources(config).values())
    except UserError as error:
        return [str(error)]
    if config.eval_path:
        sources.append(evaluation_config(config))
    sources = [source for source in sources if source.path]
    problems = [_find_bad_row(source, config.on_bad_row == "skip") for source in sources]
    if not config.dataset_info:  # LLaMA-Factory's lists name columns that a file may not have
        problems += [_find_missing_column(source) for source in sources if source.columns]
    return [problem for problem in problems if problem]


def _find_bad_row(source: SourceConfig, skip: bool) -> str | None:
    assert source.path is not None
    if source.path.startswith(HUB):
        return _check_hub_name(source.path)  # its rows are read when they are tokenized
    try:
        files = file_rows.find(source.path, source.format == "text")
        check_all = sum(file.stat().st_size for file in files) <= CHECKED_AT_SUBMIT_BYTES
        for number, (location, row) in enumerate(iter_rows(source, by_line=False), start=1):
            try:
                parse_row(source, location, row)
            except UserError:
                if not skip:
                    raise
            if not check_all and number == CHECKED_AT_SUBMIT_ROWS:
                break
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"data.path={error.filename} cannot be read: {error.strerror}"
    return None


def _check_hub_name(path: str) -> str | None:
    """The problem with hub:NAME. `datasets` would read a local folder with that name instead."""
    name = path.removeprefix(HUB)
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists():
        return None
    return f"data.path={path} is not a data set of the hub → hub:OWNER/NAME, or data.path=FOLDER"


def _find_missing_column(source: SourceConfig) -> str | None:
    """A setting of data.columns whose column is missing in the first rows."""
    if str(source.path).startswith(HUB):
        return None
    columns: set[str] = set()
    with suppress(UserError, OSError):  # already reported
        for _, row in islice(iter_rows(source, by_line=False), CHECKED_AT_SUBMIT_ROWS):
            columns |= row.keys() if isinstance(row, dict) else set()
    missing = [
        field for field, column in source.columns.items() if columns and column not in columns
    ]
    if not missing:
        return None
    return (
        f"data.columns.{missing[0]}={source.columns[missing[0]]} is not a column of {source.path}; "
        f"the columns are {', '.join(sorted(columns))}"
    )


def _file_rows(path: str, text: bool, by_line: bool) -> Iterator[RawRow]:
    for file in file_rows.find(path, text):
        is_text = file_rows.suffix_of(file) == ".txt"
        yield from _text_rows(file, by_line) if is_text else file_rows.read(file)


def _text_rows(path: Path, by_line: bool) -> Iterator[RawRow]:
    """A .txt file in parts, or its lines. Only a line feed ends a line. Blank lines are left
    out."""
    rows = _lines(path) if by_line else _parts(path)
    return file_rows.checked_rows(path, rows, "text; add some")


def _lines(path: Path) -> Iterator[tuple[str, TextPart]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", TextPart(line.rstrip("\r\n"))


def _parts(path: Path) -> Iterator[tuple[str, TextPart]]:
    """The text in parts that end at the ends of lines, so that a file of any size needs little
    memory."""
    with path.open(encoding="utf-8-sig") as file:
        pending, is_first = "", True
        while lines := file.readlines(PART_CHARACTERS):
            if pending.strip():
                yield str(path), TextPart(pending, is_first, is_last=False)
                is_first, pending = False, ""
            pending += "".join(lines)
        if pending.strip() or not is_first:
            yield str(path), TextPart(pending, is_first)


def _hub_rows(source: SourceConfig) -> Iterator[RawRow]:
    for index, row in enumerate(_load_hub(source)):
        yield f"{source.path}[{source.split}][{index}]", file_rows.remove_nulls(row)


def _load_hub(source: SourceConfig) -> Dataset:
    """Downloaded once into the cache of `datasets`, then read from there."""
    from datasets import load_dataset  # its import takes seconds

    name = (source.path or "").removeprefix(HUB)
    try:
        return load_dataset(name, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # raises whatever its readers and the network raise
        raise UserError(
            f"data.path={source.path} (subset {source.subset}, split {source.split}) cannot be "
            f"loaded: {error}"
        ) from error
