"""Where a model with new tokens is kept: a folder of the cache. Imports no torch.

The folder is a function of the base folder and the tokens alone, so every rank, node and later
command finds the same one. It is renamed to its name once it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.folders import paths
from launcher.folders.json_file import read_object_or_empty

FORMAT = 1  # part of the name: increase it when the content changes
ROW_MULTIPLE = 64  # a vocabulary that grows is rounded up to it, for fast matrix products
RECORD = ".new_tokens.json"  # in the folder: what was added
FILES = "files"  # in the record: size and checksum of each file that is not a link to the base's


def extended_folder(base: Path, tokens: Sequence[str]) -> Path:
    """The folder of `base` with new `tokens`, which may not have been made yet. It is `base` itself
    if that already is such a folder."""
    if read_record(base).get("tokens") == list(tokens):
        return base
    base = base.resolve()
    files = sorted(
        (path.name, (status := path.stat()).st_size, status.st_mtime_ns)
        for path in base.iterdir()
        if path.is_file()
    )
    identity = [FORMAT, ROW_MULTIPLE, str(base), files, list(tokens)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return paths.cache() / "models" / f"{base.name}-{digest}"


def read_record(folder: Path) -> dict[str, Any]:
    """What was added to the model in `folder`; empty for a model without new tokens."""
    return read_object_or_empty(folder / RECORD)


def padded_rows(tokens: int) -> int:
    """The rows of a vocabulary that has grown to `tokens`."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def is_special_token(token: str) -> bool:
    """Whether a new token is a marker that decoded answers leave out: `<|…|>`. All others are
    text."""
    return token.startswith("<|") and token.endswith("|>")


def describe_extension(folder: Path) -> str:
    """A log line about the new tokens of the model in `folder`."""
    record = read_record(folder)
    added, known, (before, after) = record["added"], record["known"], record["rows"]
    parts = [f"{len(added)} added ({', '.join(added)})"] if added else []
    if known:
        parts.append(f"{len(known)} that the tokenizer has already ({', '.join(known)})")
    rows = f"{before:,} rows" if before == after else f"{before:,} → {after:,} rows"
    return f"{'; '.join(parts)}; embedding: {rows}; {folder}"
