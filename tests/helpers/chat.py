"""Chat input, and run folders to chat with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.folders import manifest
from launcher.folders.checkpoint import ADAPTER, MANIFEST, MODEL


def typed(*lines: str) -> Callable[[str], str]:
    """Return these lines one after another, and then the end of input."""
    left = list(lines)

    def line(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return line


def write_checkpoint(folder: Path, adapter: Path | None, base: Path, **said: Any) -> Path:
    """A folder as a run leaves it; `adapter` None: the shards of a full model."""
    part = folder / (MODEL if adapter is None else ADAPTER)
    if adapter is None:
        part.mkdir(parents=True)
        (part / ".metadata").write_bytes(b"shards")
    else:
        shutil.copytree(adapter, part, ignore=shutil.ignore_patterns("README.md"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    (folder / "trainer.json").write_text("{}")
    (folder / "config.yaml").write_text("model: {}\n")
    told = {
        "step": 2,
        "content": "all",
        "base": {"name_or_path": str(base), "revision": None},
        **said,
    }
    manifest.write(folder / MANIFEST, told)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
