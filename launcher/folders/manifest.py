"""The list of a folder's files with sizes and checksums, written last. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError
from launcher.folders import durable

BLOCK_BYTES = 1 << 20
Entries = dict[str, dict[str, Any]]  # name → bytes, xxh3_128


def write(path: Path, content: dict[str, Any], files: Entries | None = None) -> None:
    """Write `content` and, under the key `files`, `files` or the entries of all files next to
    `path`."""
    files = entries(path.parent) if files is None else files
    write_json(path, {**content, "files": dict(sorted(files.items()))})


def entries(folder: Path, include: Callable[[Path], bool] = lambda path: True) -> Entries:
    """Name below `folder` → size and xxh3-128, for all files that `include` accepts."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and include(path)
    }


def check(path: Path) -> dict[str, Any]:
    """Compare every file with the manifest in `path`, and return the manifest.

    Raises UserError with the names of all files that are missing or changed.
    """
    manifest = read(path)
    if messages := problems(path):
        raise UserError("; ".join(messages))
    return manifest


def read(path: Path) -> dict[str, Any]:
    """The manifest in `path`, files unchecked. Raises UserError if it is not a manifest."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest: {error}") from error
    return manifest


def problems(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """A message for each file that is missing or changed. `parts` callers can share the work:
    each passes its own `part`, from 0."""
    share = sorted(read(path)["files"].items())[part::parts]
    return list(filter(None, (problem(path.parent / name, entry) for name, entry in share)))


def checksum(path: Path) -> str:
    """xxh3-128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any, private: bool = False) -> None:
    """Write `content` atomically: a reader finds the complete file or no file. See write_text."""
    write_text(path, json.dumps(content, indent=2) + "\n", private)


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Write `text` atomically: a reader finds the complete file or no file. `private`: only its
    owner can read it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666
    )
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    durable.replace(temporary, path)


def problem(path: Path, expected: dict[str, Any]) -> str | None:
    """A message if the file is missing or differs from its entry `expected`, otherwise None."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path} has {size} bytes instead of {expected['bytes']}"
    if checksum(path) != expected["xxh3_128"]:
        return f"{path} has changed since it was written"
    return None
