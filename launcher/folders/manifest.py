"""The list of a folder's files with sizes and checksums, written last. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError
from launcher.folders import durable, regular
from launcher.folders.brief import brief
from launcher.folders.json_file import (
    COUNT,
    COUNTS,
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    TEXTS,
    Field,
    check_fields,
    read_object,
)
from launcher.folders.tensor_entries import is_inside

BLOCK_BYTES = 1 << 20
# The types of the values that are read, in checkpoints and exports.
FIELDS: dict[str, Field] = {
    "step": COUNT,
    "content": TEXT,
    "eval_loss": NUMBER,
    "class": TEXT,
    "partial": FLAG,
    "quantisation": OBJECT,
    "end_tokens": COUNTS,
    "base": (lambda value: isinstance(value, dict | str), "an object or a folder"),
    "tensors": OBJECT,
}
BASE_FIELDS: dict[str, Field] = {"name_or_path": TEXT, "revision": TEXT, "add_tokens": TEXTS}
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
    """The manifest in `path`, files unchecked. Raises UserError if it is not a manifest, or has a
    value of another type."""
    manifest = read_object(path)
    if not isinstance(manifest.get("files"), dict):
        raise UserError(f"{path} is not a manifest: it lists no files")
    check_fields(path, manifest, FIELDS)
    for name, entry in manifest["files"].items():
        if not is_inside(name) or "\0" in name:
            raise UserError(f"{path} lists {brief(name)}, which lies outside the folder")
        if not isinstance(entry, dict) or not {"bytes", "xxh3_128"} <= entry.keys():
            raise UserError(f"{path} lists {name} without its size and checksum: {brief(entry)}")
        check_fields(path, entry, {"bytes": COUNT, "xxh3_128": TEXT})
    if isinstance(base := manifest.get("base"), dict):
        check_fields(path, base, BASE_FIELDS)
    return manifest


def problems(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """A message for each file that is missing or changed. `parts` callers can share the work:
    each passes its own `part`, from 0."""
    share = sorted(read(path)["files"].items())[part::parts]
    return list(filter(None, (problem(path.parent / name, entry) for name, entry in share)))


def checksum(path: Path) -> str:
    """xxh3-128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with regular.open_file(path) as file:
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
