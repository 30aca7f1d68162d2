"""A folder's list of files with sizes and checksums, written last and checked later. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError

BLOCK = 1 << 20
Entries = dict[str, dict[str, Any]]  # name → bytes, xxh3_128


def write(path: Path, content: dict[str, Any], files: Entries | None = None) -> None:
    """Write `content` and, under `files`, the entry of every file beside `path`, or those given."""
    files = entries(path.parent) if files is None else files
    write_json(path, {**content, "files": dict(sorted(files.items()))})


def entries(folder: Path, among: Callable[[Path], bool] = lambda path: True) -> Entries:
    """Name below `folder` → size and xxh3-128, of the files that `among` takes."""
    return {
        str(each.relative_to(folder)): {"bytes": each.stat().st_size, "xxh3_128": checksum(each)}
        for each in sorted(folder.rglob("*"))
        if each.is_file() and among(each)
    }


def check(path: Path) -> dict[str, Any]:
    """The manifest, after comparing every file with it.

    Raises UserError naming all files that are missing or changed.
    """
    manifest = read(path)
    if wrong := problems(path):
        raise UserError("; ".join(wrong))
    return manifest


def read(path: Path) -> dict[str, Any]:
    """The manifest alone. Raises UserError when it is none."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest: {error}") from error
    return manifest


def problems(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """A sentence for each file that is missing or changed; `parts` callers share the work."""
    listed = sorted(read(path)["files"].items())[part::parts]
    return list(filter(None, (problem(path.parent / name, entry) for name, entry in listed)))


def checksum(path: Path) -> str:
    """xxh3-128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that a reader finds the whole file or none."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader finds the whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def problem(path: Path, expected: dict[str, Any]) -> str | None:
    """A sentence when the file is missing or not what `expected` says."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path} has {size} bytes instead of {expected['bytes']}"
    if checksum(path) != expected["xxh3_128"]:
        return f"{path} has another content than when it was written"
    return None
