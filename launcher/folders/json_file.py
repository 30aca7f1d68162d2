"""Read a JSON object, the format of model and adapter settings. Imports no torch."""

from __future__ import annotations

import json
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
