"""Read a JSON object, the format of model and adapter settings and of the small files of a run, and
write it in the form it had.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders import regular
from launcher.folders.brief import brief
from launcher.folders.unreadable import reason_unreadable

Field = tuple[Callable[[Any], bool], str]  # whether a value is accepted, and what is expected


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0."""
    return type(value) is int and value >= 0


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Accepts a list with elements that `check` accepts."""
    return lambda value: isinstance(value, list) and all(map(check, value))


COUNT: Field = (is_count, "a whole number")
NUMBER: Field = (lambda value: type(value) in (int, float), "a number")
FINITE: Field = (lambda value: type(value) in (int, float) and math.isfinite(value), "a number")
FLAG: Field = (lambda value: isinstance(value, bool), "true or false")
TEXT: Field = (is_text, "text")
OBJECT: Field = (is_object, "an object")
TEXTS: Field = (list_of(is_text), "a list of texts")
COUNTS: Field = (list_of(is_count), "a list of whole numbers")
IDS: Field = (
    lambda value: type(value) is int or (isinstance(value, list) and {*map(type, value)} <= {int}),
    "a token id or a list of them",
)


class DamagedFile(UserError):
    """A file that is there and cannot be used."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path


def or_null(field: Field) -> Field:
    """Also accepts null."""
    accepts, expected = field
    return lambda value: value is None or accepts(value), f"{expected} or null"


def check_fields(path: Path, content: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Raises DamagedFile if `content`, which is from the file `path`, has one of `fields` with a
    value of another type. null counts as absent."""
    for key, (accepts, expected) in fields.items():
        if key in content and content[key] is not None and not accepts(content[key]):
            shown = f"{brief(content[key])}"
            raise DamagedFile(path, f"is damaged: {key} is {shown}, expected {expected}")


def read_json(path: Path) -> Any:
    """The value in `path`. Raises DamagedFile if it cannot be read or is not JSON."""
    try:
        return json.loads(regular.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = reason_unreadable(path) or f"cannot be read: {error!s:.200}"
        raise DamagedFile(path, reason) from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises DamagedFile if it cannot be read or is not an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedFile(path, f"contains a {type(content).__name__}, expected an object")
    return content


def read_fields(path: Path, **fields: Field) -> dict[str, Any]:
    """The object in `path`, in which each of `fields` has its type.

    Raises DamagedFile if it cannot be read, is not an object, or one of these fields is missing or
    of another type.
    """
    content = read_object(path)
    for name, (accepts, expected) in fields.items():
        if name not in content:
            raise DamagedFile(path, f"is damaged: it has no {name}")
        if not accepts(content[name]):
            shown = f"{brief(content[name])}"
            raise DamagedFile(path, f"is damaged: {name} is {shown}, expected {expected}")
    return content


def read_object_or_empty(path: Path) -> dict[str, Any]:
    """The object in `path`, empty if there is none: other checks or the loader report that."""
    try:
        return read_object(path)
    except UserError:
        return {}


def dump_like(content: dict[str, Any], text: str) -> str:
    """`content` as JSON with the indent, the escapes and the last newline of the JSON in `text`.

    With "", two spaces, no escapes and a last newline.
    """
    indent = re.match(r"\s*\{\r?\n([ \t]*)", text)
    is_compact = bool(text) and indent is None
    result = json.dumps(
        content,
        indent=None if is_compact else (indent[1] if indent and indent[1] else 2),
        ensure_ascii=bool(text) and text.isascii(),
        separators=(",", ":") if is_compact and '": ' not in text else None,
    )
    return result + ("\n" if not text or text.endswith("\n") else "")
