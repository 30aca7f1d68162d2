"""Read a JSON object, the format of model and adapter settings and of the small files of a run, and
write it in the form it had.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from launcher.errors import UserError

# A field's type, or several; None is allowed if `type(None)` is one of them.
FieldType = type | tuple[type, ...]


class DamagedFile(UserError):
    """A file that is there and cannot be used."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path


def read_object(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises DamagedFile if it cannot be read or is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(path, f"cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DamagedFile(path, f"contains a {type(content).__name__}, expected an object")
    return content


def read_fields(path: Path, **types: FieldType) -> dict[str, Any]:
    """The object in `path`, in which each field of `types` has its type.

    Raises DamagedFile if it cannot be read, is not an object, or one of these fields is missing or
    of another type. A bool is not a number, and a number is finite.
    """
    content = read_object(path)
    for name, expected in types.items():
        if name not in content:
            raise DamagedFile(path, f"is damaged: it has no {name!r}")
        if not has_type(content[name], expected):
            shown = json.dumps(content[name])[:60]
            raise DamagedFile(path, f"is damaged: {name!r} is {shown}")
    return content


def has_type(value: Any, expected: FieldType) -> bool:
    """Whether `value` has this type. A bool is not a number, and a number is finite."""
    if isinstance(value, bool):
        return expected is bool or (isinstance(expected, tuple) and bool in expected)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, expected)


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
