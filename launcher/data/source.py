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
from launcher.data.files import file_rows, splits, text_files
from launcher.data.files.file_rows import RawRow
from launcher.data.files.nulls import remove_nulls
from launcher.data.files.source_files import (
    check_streaming,
    describe_left_out,
    encoding_content,
    find_files,
)
from launcher.data.rows import columns, dataset_info
from launcher.data.rows.row_formats import Conversation, read_text, to_conversation
from launcher.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

CHECKED_AT_SUBMIT_BYTES = 32_000_000  # about a third of a second of reading
CHECKED_AT_SUBMIT_ROWS = 1_000  # of larger files
BLOCK_BYTES = 1 << 20  # read at a time
COMPRESSION_RATIO = 8  # of a compressed file, about, to find out whether it is large
MAX_BAD_ROWS = 5  # of a source are named at once
PART_CHARACTERS = 1 << 16  # size of the parts in which a long text is read


@dataclass(frozen=True)
class TextPart:
    """A raw text, or a part of one that is too long to be read at once."""

    text: str
    is_first: bool = True
    is_last: bool = True
    notes: tuple[str, ...] = ()  # what the log should say about rows like this one


ParsedRow = Conversation | TextPart


def resolve_sources(config: DataConfig) -> dict[str, SourceConfig]:
    """The sources to train on, by name. Raises UserError for an invalid data.dataset_info."""
    if config.dataset_info:
        text = config.format == "text"
        sources = dataset_info.read(config.dataset_info, config.name, text)
        return {name: replace(each, encoding=config.encoding) for name, each in sources.items()}
    return config.sources or {config.name: config}


def evaluation_config(config: DataConfig) -> DataConfig:
    """The settings that read `data.eval_path` alone, in the format of `data.path` or, if they all
    have the same one, of the sources."""
    formats = {source.format for source in resolve_sources(config).values()}
    format = formats.pop() if len(formats) == 1 else "auto"
    single = replace(config, sources={}, dataset_info=None, max_rows=None, streaming=False)
    path = config.eval_path or ""
    subset = config.subset if path.startswith(HUB) or _has_subset(config) else None
    return replace(single, path=path, format=format, subset=subset, split=splits.FOR_EVALUATION)


def _has_subset(config: DataConfig) -> bool:
    """Whether data.eval_path is a folder that contains data.subset."""
    path = config.eval_path or ""
    if config.subset is None or not Path(path).is_dir():
        return False
    return splits.has_subset(Path(path), file_rows.find(path, text=True), config.subset)


def file_notes(config: DataConfig) -> Iterator[str]:
    """Log lines about the files of the sources' folders that are not read."""
    for source in resolve_sources(config).values():
        yield from describe_left_out(source)


def iter_rows(source: SourceConfig, by_line: bool) -> Iterator[RawRow]:
    """Each row as it is stored, with its location. A row of a .txt file is a TextPart (`by_line`: a
    line).

    Raises UserError if a file cannot be read.
    """
    is_hub = (source.path or "").startswith(HUB)
    return islice(_hub_rows(source) if is_hub else _file_rows(source, by_line), source.max_rows)


def parse_row(source: SourceConfig, location: str, row: Any) -> ParsedRow:
    """The conversation or text of a raw row. Raises UserError for a bad row."""
    if isinstance(row, UserError):
        raise row
    if isinstance(row, TextPart) and source.format == "text":
        return row
    renamed = rename_columns(location, row, source.columns)
    if source.format == "text":
        columns.refuse_media(location, renamed)
        notes = tuple(columns.ignored(renamed, "text"))
        return TextPart(read_text(location, renamed, "text"), notes=notes)
    return to_conversation(location, renamed, source.format, source.tags)


def iter_content(source: SourceConfig) -> Iterator[bytes]:
    """Bytes that change when the data of `source` changes, but not with file names or dates."""
    path = source.path or ""
    if path.startswith(HUB):
        # The fingerprint covers the content of the files and how the data set was made from them.
        yield str(_load_hub(source)._fingerprint).encode()
        return
    yield from encoding_content(source)
    for file in find_files(source):
        suffix = "".join(file.suffixes[-2:]) if text_files.compression_of(file) else file.suffix
        yield f"{suffix} {file.stat().st_size}".encode()
        with file.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                yield block
        if file_rows.removes_nulls(file, source.encoding):
            yield b"without nulls"  # earlier versions kept them


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
        streamed = [source for source in sources if config.streaming and source.path]
        sources += [evaluation_config(config)] if config.eval_path else []
    except UserError as error:
        return [str(error)]
    sources = [source for source in sources if source.path]
    skips = config.on_bad_row == "skip"
    problems = [
        problem
        for source in sources
        for problem in _find_bad_rows(source, skips, source in streamed)
    ]
    if (config.sources or config.dataset_info) and config.split != splits.TRAIN:
        problems.append(
            f"data.split={config.split} has no effect: each source has its own → remove data.split"
        )
    missing = [_find_missing_column(config, source) for source in sources if source.columns]
    return problems + [problem for problem in missing if problem]


def _find_bad_rows(source: SourceConfig, skip: bool, is_streamed: bool) -> list[str]:
    assert source.path is not None
    is_hub = source.path.startswith(HUB)
    if is_hub and (problem := _check_hub_name(source.path)):
        return [problem]
    try:
        text_files.codec_name(source.encoding)
        if is_streamed:
            check_streaming(source)
        if is_hub:  # the rows are read when they are tokenized
            return []
        bad_rows = list(_bad_rows(source))
    except UserError as error:
        return [str(error)]
    except OSError as error:
        return [f"data.path={error.filename} cannot be read: {error.strerror}"]
    if skip:
        return []
    more = len(bad_rows) - MAX_BAD_ROWS
    return bad_rows[:MAX_BAD_ROWS] + ([f"… and {more:,} more bad rows"] if more > 0 else [])


def _bad_rows(source: SourceConfig) -> Iterator[str]:
    files = find_files(source)
    size = sum(map(_size_of_text, files))
    check_all = size <= CHECKED_AT_SUBMIT_BYTES
    for file in files:
        file_rows.check(file, source.encoding)
    rows = _file_rows(source, by_line=False, as_stored=not check_all)
    limits = [source.max_rows, None if check_all else CHECKED_AT_SUBMIT_ROWS]
    stop = min((limit for limit in limits if limit is not None), default=None)
    for location, row in islice(rows, stop):
        try:
            parse_row(source, location, row)
        except UserError as error:
            yield str(error)


def _size_of_text(file: Path) -> int:
    size = file.stat().st_size
    return size * COMPRESSION_RATIO if text_files.compression_of(file) else size


def _check_hub_name(path: str) -> str | None:
    """The problem with hub:NAME. `datasets` would read a local folder with that name instead."""
    name = path.removeprefix(HUB)
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists():
        return None
    return f"data.path={path} is not a data set of the hub → hub:OWNER/NAME, or data.path=FOLDER"


def _find_missing_column(config: DataConfig, source: SourceConfig) -> str | None:
    """A setting of data.columns whose column is missing in the first rows.

    LLaMA-Factory's lists may name columns that a file does not have, if its rows are complete
    without them.
    """
    if str(source.path).startswith(HUB):
        return None
    columns: set[str] = set()
    with suppress(UserError, OSError):  # already reported
        rows = _file_rows(source, by_line=False, as_stored=True)
        for _, row in islice(rows, CHECKED_AT_SUBMIT_ROWS):
            columns |= row.keys() if isinstance(row, dict) else set()
    missing = [
        field
        for field, column in source.columns.items()
        if columns
        and column not in columns
        and not (config.dataset_info and field in dataset_info.OPTIONAL_FIELDS)
    ]
    if not missing:
        return None
    field, column = missing[0], source.columns[missing[0]]
    where = f"data.dataset_info={config.dataset_info}: " if config.dataset_info else "data.columns."
    return (
        f"{where}{field}={column} is not a column of {source.path}; the columns are "
        f"{', '.join(sorted(columns))}"
    )


def _file_rows(source: SourceConfig, by_line: bool, as_stored: bool = False) -> Iterator[RawRow]:
    for file in find_files(source):
        if file_rows.suffix_of(file) == ".txt":
            yield from _text_rows(file, source.encoding, by_line)
        else:
            yield from file_rows.read(file, source.encoding, as_stored)


def _text_rows(path: Path, encoding: str, by_line: bool) -> Iterator[RawRow]:
    """A .txt file in parts, or its lines. Only a line feed ends a line. Blank lines are left
    out."""
    rows = _lines(path, encoding) if by_line else _parts(path, encoding)
    return file_rows.checked_rows(path, encoding, rows)


def _lines(path: Path, encoding: str) -> Iterator[tuple[str, TextPart]]:
    with text_files.open_text(path, encoding, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", TextPart(line.rstrip("\r\n"))


def _parts(path: Path, encoding: str) -> Iterator[tuple[str, TextPart]]:
    """The text in parts that end at the ends of lines, so that a file of any size needs little
    memory."""
    with text_files.open_text(path, encoding) as file:
        pending, is_first = "", True
        while lines := file.readlines(PART_CHARACTERS):
            if pending.strip():
                yield str(path), TextPart(pending, is_first, is_last=False)
                is_first, pending = False, ""
            pending += "".join(lines)
        if pending.strip() or not is_first:
            yield str(path), TextPart(pending, is_first)


def _hub_rows(source: SourceConfig) -> Iterator[RawRow]:
    rows = _load_hub(source)
    split = rows.split if source.split == splits.FOR_EVALUATION else source.split
    for index, row in enumerate(rows):
        yield f"{source.path}[{split}][{index}]", remove_nulls(row)


def _load_hub(source: SourceConfig) -> Dataset:
    """Downloaded once into the cache of `datasets`, then read from there."""
    from datasets import load_dataset  # its import takes seconds

    name = (source.path or "").removeprefix(HUB)
    for_evaluation = source.split == splits.FOR_EVALUATION
    try:
        split = None if for_evaluation else source.split
        loaded = load_dataset(name, source.subset, split=split, revision=source.revision)
    except Exception as error:  # raises whatever its readers and the network raise
        where = "" if for_evaluation else f", split {source.split}"
        raise UserError(
            f"data.path={source.path} (subset {source.subset}{where}) cannot be loaded: {error}"
        ) from error
    if not for_evaluation:
        return loaded
    chosen = splits.choose_name(loaded, source.split)
    if chosen is None:
        raise UserError(
            f"data.eval_path={source.path} has neither a validation nor a test split, but "
            f"{', '.join(loaded)} → a file, or data.eval_rows"
        )
    return loaded[chosen]
