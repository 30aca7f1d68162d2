"""What `data=` names: conversations, or raw texts, of one source or several. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.config.data import HUB, DataConfig, SourceConfig
from launcher.data import dataset_info, files
from launcher.data.formats import Conversation, text_of, to_conversation
from launcher.errors import UserError

CHECKED_AT_SUBMIT_BYTES = 32_000_000  # about a third of a second of reading
LOOKED_AT_ROWS = 1_000  # of a larger file

PART_CHARACTERS = 1 << 16  # of a text that is read in parts


@dataclass(frozen=True)
class TextPart:
    """Raw text: a whole one, or a part of one that is too long to be held."""

    text: str
    begins: bool = True
    ends: bool = True


Found = Conversation | TextPart  # what a row is read as


def sources_of(config: DataConfig) -> dict[str, SourceConfig]:
    """The sources to learn from, by name. Raises UserError for a dataset_info that is not good."""
    if config.dataset_info:
        text = config.format == "text"
        return dataset_info.read(config.dataset_info, config.name, text)
    return config.sources or {config.name: config}


def evaluation_of(config: DataConfig) -> DataConfig:
    """`data.eval_path` alone, read as `data.path` is, or as all sources are."""
    formats = {source.format for source in sources_of(config).values()}
    format = formats.pop() if len(formats) == 1 else "auto"
    alone = replace(config, sources={}, dataset_info=None, max_rows=None, streaming=False)
    return replace(alone, path=config.eval_path, format=format)


def rows_of(source: SourceConfig, by_line: bool) -> Iterator[tuple[str, Any]]:
    """Each row as it is stored, with its place. Of .txt files a row is a TextPart (`by_line`: a
    line).

    Raises UserError for a file that cannot be read on.
    """
    path, text = source.path or "", source.format == "text"
    rows = _hub_rows(source) if path.startswith(HUB) else _file_rows(path, text, by_line)
    for number, row in enumerate(rows):
        if number == source.max_rows:
            break
        yield row


def read_row(source: SourceConfig, place: str, row: Any) -> Found:
    """What is to be tokenised of a stored row. Raises UserError where nothing can be."""
    if isinstance(row, UserError):
        raise row
    if isinstance(row, TextPart) and source.format == "text":
        return row
    named = renamed(place, row, source.columns)
    if source.format == "text":
        return TextPart(text_of(place, named, "text"))
    return to_conversation(place, named, source.format, source.tags)


def content(source: SourceConfig) -> Iterator[bytes]:
    """Bytes that change when what `source` names does, and not with the files' names and dates."""
    path = source.path or ""
    if path.startswith(HUB):
        yield str(_hub(source)._fingerprint).encode()  # of its files' contents and how it was made
        return
    for file in files.find(path, source.format == "text"):
        yield f"{file.suffix} {file.stat().st_size}".encode()
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                yield block


def renamed(place: str, row: Any, columns: dict[str, str]) -> dict[str, Any]:
    """`row` with the fields that a format asks for, taken from the columns that hold them."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is {type(row).__name__}, not an object with named fields")
    taken = {field: row[name] for field, name in columns.items() if name in row}
    return {key: value for key, value in row.items() if key not in columns.values()} | taken


def problems(config: DataConfig) -> list[str]:
    """What is wrong with the data, as far as a short look tells. Of large files the first thousand
    rows are read; the others are checked, with the same sentences, when they are tokenised."""
    try:
        sources = list(sources_of(config).values())
    except UserError as error:
        return [str(error)]
    if config.eval_path:
        sources.append(evaluation_of(config))
    looked = [_problem(each, config.on_bad_row == "skip") for each in sources if each.path]
    if not config.dataset_info:  # LLaMA-Factory's lists name columns that a file may not have
        looked += [_lost_column(each) for each in sources if each.path and each.columns]
    return [problem for problem in looked if problem]


def _problem(source: SourceConfig, skip: bool) -> str | None:
    assert source.path is not None
    if source.path.startswith(HUB):
        return _no_hub_name(source.path)  # it is read where it is tokenised
    try:
        found = files.find(source.path, source.format == "text")
        whole = sum(file.stat().st_size for file in found) <= CHECKED_AT_SUBMIT_BYTES
        for number, (place, row) in enumerate(rows_of(source, by_line=False), start=1):
            try:
                read_row(source, place, row)
            except UserError:
                if not skip:
                    raise
            if not whole and number == LOOKED_AT_ROWS:
                break
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"data.path={error.filename} cannot be read: {error.strerror}"
    return None


def _no_hub_name(path: str) -> str | None:
    """`datasets` would take a folder of that name for the data set."""
    name = path.removeprefix(HUB)
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists():
        return None
    return f"data.path={path} names none of the hub → hub:OWNER/NAME, or data.path=FOLDER"


def _lost_column(source: SourceConfig) -> str | None:
    """A setting of data.columns that names no column of the first rows."""
    if str(source.path).startswith(HUB):
        return None
    columns: set[str] = set()
    with suppress(UserError, OSError):  # said already
        for _, row in islice(rows_of(source, by_line=False), LOOKED_AT_ROWS):
            columns |= row.keys() if isinstance(row, dict) else set()
    lost = [field for field, column in source.columns.items() if columns and column not in columns]
    if not lost:
        return None
    return (
        f"data.columns.{lost[0]}={source.columns[lost[0]]} is no column of {source.path}; "
        f"there are {', '.join(sorted(columns))}"
    )


def _file_rows(path: str, text: bool, by_line: bool) -> Iterator[tuple[str, Any]]:
    for file in files.find(path, text):
        plain = files.kind_of(file) == ".txt"
        yield from _plain(file, by_line) if plain else files.read(file)


def _plain(path: Path, by_line: bool) -> Iterator[tuple[str, Any]]:
    """A .txt file in parts, or its lines. Lines end with a line feed, and those of spaces are
    none."""
    parts = _lines(path) if by_line else _parts(path)
    return files.readable(path, parts, "text; give it some")


def _lines(path: Path) -> Iterator[tuple[str, TextPart]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", TextPart(line.rstrip("\r\n"))


def _parts(path: Path) -> Iterator[tuple[str, TextPart]]:
    """Cut at ends of lines, so that a file of any size is read in little memory."""
    with path.open(encoding="utf-8-sig") as file:
        held, begins = "", True
        while lines := file.readlines(PART_CHARACTERS):
            if held.strip():
                yield str(path), TextPart(held, begins, ends=False)
                begins, held = False, ""
            held += "".join(lines)
        if held.strip() or not begins:
            yield str(path), TextPart(held, begins)


def _hub_rows(source: SourceConfig) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(_hub(source)):
        yield f"{source.path}[{source.split}][{index}]", files.without_nulls(row)


def _hub(source: SourceConfig) -> Any:
    """Downloaded into the cache of `datasets` once, then read from there."""
    from datasets import load_dataset  # seconds to import, and only for this

    name = (source.path or "").removeprefix(HUB)
    try:
        return load_dataset(name, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # it raises what its readers and the network do
        raise UserError(
            f"data.path={source.path} (subset {source.subset}, split {source.split}) cannot be "
            f"loaded: {error}"
        ) from error
