"""Rows of JSON: a list of rows, or a row per line. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.data.files.nulls import SPEAKER_FIELDS
from launcher.data.files.text_files import BLOCK_BYTES, open_text
from launcher.errors import UserError

RawRow = tuple[str, Any]  # location (file:line or file[index]), row as it is stored in the file
ANY = re.compile(r"\S")  # in a line that is not blank
NAMED_KEYS = 8  # at most, in a message
WAY_OUT = "write a list of rows, or one object per line as .jsonl"


def read_json_lines(path: Path, encoding: str, pattern: re.Pattern[str] = ANY) -> Iterator[RawRow]:
    """The row of each line that contains `pattern`, by default of each that is not blank; a
    UserError for a line that is not JSON."""
    with open_text(path, encoding) as file:
        for number, line in enumerate(file, start=1):
            if pattern.search(line):
                location = f"{path}:{number}"
                try:
                    yield location, json.loads(line)
                except (ValueError, RecursionError) as error:
                    if number == 1 and line.strip() == "[":
                        raise UserError(
                            f"{path} is a list over several lines, not one object per line; rename "
                            "it to .json"
                        ) from error
                    yield location, UserError(f"{location} is not JSON: {_reason(error, line)}")


def _reason(error: ValueError | RecursionError, line: str) -> str:
    """Why `line` is not JSON; the location of the row already says which line it is."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    ends_in_text = line.endswith("\n") and error.pos >= len(line) - 1
    hint = " (does the line end inside a text?)" if ends_in_text else ""
    return f"{error.msg} at column {error.colno}{hint}"


def read_json(path: Path, encoding: str, max_in_memory: int) -> Iterator[RawRow]:
    """The rows of a list or of lines. A list of more than `max_in_memory` characters is read row by
    row, because as Python objects it takes five times its size."""
    with open_text(path, encoding) as file:
        text = file.read(max_in_memory + 1)
    is_complete = len(text) <= max_in_memory
    first = ANY.search(text)
    start = first.group() if first else ""
    if start == "{" and _has_a_row_per_line(path, text.strip(), is_complete):
        del text
        yield from read_json_lines(path, encoding)
    elif start == "[" and not is_complete:
        del text
        yield from _stream_list(path, encoding)
    else:
        for index, row in enumerate(_load_list(path, text)):
            yield f"{path}[{index}]", row


def _load_list(path: Path, text: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; one object per line is .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} must contain a list of rows, not {type(rows).__name__}")
    return rows


def _stream_list(path: Path, encoding: str) -> Iterator[RawRow]:
    import ijson

    index, rows = 0, ijson.sendable_list()
    parser = ijson.items_coro(rows, "item", use_float=True)
    with open_text(path, encoding) as file:
        try:
            for text in iter(lambda: file.read(BLOCK_BYTES), ""):
                parser.send(text.encode())
                for row in rows:
                    yield f"{path}[{index}]", row
                    index += 1
                rows.clear()
            parser.close()
        except ijson.JSONError as error:
            reason, _, _ = str(error).partition("\n")  # an excerpt follows
            raise UserError(f"{path}[{index + len(rows)}] is not JSON: {reason}") from error


def _has_a_row_per_line(path: Path, text: str, is_complete: bool) -> bool:
    """Whether `text`, which starts with an object, has a row per line. Raises UserError for objects
    over several lines, and for an object that contains the rows."""
    line, _, rest = text.partition("\n")
    if not is_complete and not rest:
        raise UserError(f"{path} must contain a list of rows, not one large object; {WAY_OUT}")
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        if not is_complete:
            raise UserError(f"{path} starts with an object over several lines; {WAY_OUT}") from None
        _refuse_objects(path, text)
    if not rest:
        _refuse_table(path, first)
    return True


def _refuse_objects(path: Path, text: str) -> None:
    try:
        first, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; one object per line is .jsonl") from error
    if text[end:].strip():
        raise UserError(f"{path} has several objects without a list around them; {WAY_OUT}")
    _refuse_table(path, first)
    raise UserError(f"{path} must contain a list of rows, not one object; {WAY_OUT}")


def _refuse_table(path: Path, value: dict[str, Any]) -> None:
    """Raises UserError if `value` is the whole data set in another arrangement, not a row."""
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    if wrapped := [key for key, items in lists.items() if _are_rows(items)]:
        raise UserError(
            f"{path} has its rows under the key {', '.join(wrapped)}, not in a list; write a file "
            f"that contains only the list under {wrapped[0]}"
        )
    # {"instruction": ["a", "b"], "output": ["c", "d"]}, and pandas' {"instruction": {"0": "a"}}
    has_lists = len(lists) == len(value) and not any(map(_are_objects, lists.values()))
    if has_lists or all(isinstance(item, dict) for item in value.values()):
        keys = ", ".join(islice(value, NAMED_KEYS)) + (", …" if len(value) > NAMED_KEYS else "")
        raise UserError(
            f"{path} must contain a list of rows, but is one object with the keys "
            f"{keys or '(none)'}; {WAY_OUT}"
        )


def _are_objects(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, dict) for item in items)


def _are_rows(items: list[Any]) -> bool:
    """Whether `items` are objects, and neither messages nor tools."""
    other = {*SPEAKER_FIELDS, "function", "parameters"}
    return _are_objects(items) and not any(other & item.keys() for item in items)
