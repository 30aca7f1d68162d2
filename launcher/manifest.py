"""A folder's list of files with sizes and checksums, written last and checked later. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError

BLOCK = 1 << 20


def write(path: Path, content: dict[str, Any]) -> None:
    """Write `content` and, under `files`, size and xxh3-128 of every file beside `path`."""
    folder = path.parent
    files = {
        str(each.relative_to(folder)): {"bytes": each.stat().st_size, "xxh3_128": checksum(each)}
        for each in sorted(folder.rglob("*"))
        if each.is_file()
    }
    write_json(path, {**content, "files": files})


def check(path: Path) -> dict[str, Any]:
    """The manifest, after comparing every file with it.

    Raises UserError naming all files that are missing or changed.
    """
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        listed = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest: {error}") from error
    wrong = list(filter(None, (_wrong(path.parent / name, expected) for name, expected in listed)))
    if wrong:
        raise UserError("; ".join(wrong))
    return manifest


def checksum(path: Path) -> str:
    """xxh3-128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that a reader finds the whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def _wrong(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path} has {size} bytes instead of {expected['bytes']}"
    if checksum(path) != expected["xxh3_128"]:
        return f"{path} has another content than when it was written"
    return None
