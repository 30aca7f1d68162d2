"""Read a JSON object, the format of model and adapter settings, and write it in the form it had.

Imports no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from launcher.errors import UserError


def read_object(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises UserError if it cannot be read or is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, expected an object")
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
