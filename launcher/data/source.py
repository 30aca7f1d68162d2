"""What `data.path` holds: conversations, or raw texts. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.data import files
from launcher.data.formats import Conversation, text_of, to_conversation
from launcher.errors import UserError

CHECKED_AT_SUBMIT_BYTES = 32_000_000  # about a third of a second of reading


def read_conversations(
    path: str, format: str, columns: dict[str, str]
) -> Iterator[tuple[str, Conversation | UserError]]:
    """Each row with its place, or what is wrong with it. `columns`: field of the format → column.

    Raises UserError for a file that cannot be read on.
    """
    for file in files.find(path):
        for place, row in files.read(file):
            try:
                yield place, to_conversation(place, renamed(place, row, columns), format)
            except UserError as error:
                yield place, error


def read_texts(
    path: str, by_line: bool, columns: dict[str, str]
) -> Iterator[tuple[str, str | UserError]]:
    """Each raw text with its place: a .txt file whole or (`by_line`) its lines, else the field text
    of rows."""
    for file in _texts(path):
        if file.suffix == ".txt":
            yield from _plain(file, by_line)
            continue
        for place, row in files.read(file):
            try:
                yield place, text_of(place, renamed(place, row, columns), "text")
            except UserError as error:
                yield place, error


def renamed(place: str, row: Any, columns: dict[str, str]) -> dict[str, Any]:
    """`row` with the fields that a format asks for, taken from the columns that hold them."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is {type(row).__name__}, not an object with named fields")
    if lost := [name for name in columns.values() if name not in row]:
        raise UserError(
            f"{place} has no column {lost[0]}, which data.columns names; it has {', '.join(row)}"
        )
    taken = {field: row[name] for field, name in columns.items()}
    return {key: value for key, value in row.items() if key not in columns.values()} | taken


def problems(path: str, format: str, columns: dict[str, str], skip: bool) -> list[str]:
    """What is wrong with the data, as far as a short look tells. Of large files the first row is
    read; the others are checked, with the same sentences, when they are tokenised. With `skip` bad
    rows are none of it."""
    try:
        found = _texts(path) if format == "text" else files.find(path)
        whole = sum(file.stat().st_size for file in found) <= CHECKED_AT_SUBMIT_BYTES
        rows: Iterator[tuple[str, Any]] = (
            read_texts(path, False, columns)
            if format == "text"
            else read_conversations(path, format, columns)
        )
        for _, row in rows:
            if isinstance(row, UserError) and not skip:
                return [str(row)]
            if not whole:
                break
    except UserError as error:
        return [str(error)]
    return []


def _texts(path: str) -> list[Path]:
    return [Path(path)] if path.endswith(".txt") and Path(path).is_file() else files.find(path)


def _plain(path: Path, by_line: bool) -> Iterator[tuple[str, str]]:
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={path} is not UTF-8 ({error}); convert it") from error
    if not whole.strip():
        raise UserError(f"data.path={path} holds no text; give it some")
    if not by_line:
        yield str(path), whole
        return
    for number, line in enumerate(whole.splitlines(), start=1):
        if line.strip():
            yield f"{path}:{number}", line
