"""Things to talk to, made from the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher import manifest
from launcher.checkpoint import layout


@pytest.fixture(scope="session")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter that names its base."""
    from tests.helpers.exports import make_adapter

    return make_adapter(tiny, tmp_path_factory.mktemp("adapter") / "mine")


@pytest.fixture
def run(adapter: Path, tiny: Path, tmp_path: Path) -> Path:
    """The folder of a run with an unfinished and a finished checkpoint of an adapter."""
    folder = tmp_path / "run"
    write_checkpoint(folder / "checkpoints/step-000002", adapter, tiny)
    (folder / "checkpoints/step-000004").mkdir()
    (folder / "config.yaml").write_text("a: 1\n")
    return folder


def write_checkpoint(folder: Path, adapter: Path | None, base: Path, **said: Any) -> Path:
    """As a run leaves it; `adapter` None: the shards of a whole model."""
    part = folder / (layout.MODEL if adapter is None else layout.ADAPTER)
    if adapter is None:
        part.mkdir(parents=True)
        (part / ".metadata").write_bytes(b"shards")
    else:
        shutil.copytree(adapter, part, ignore=shutil.ignore_patterns("README.md"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    (folder / "trainer.json").write_text("{}")
    told = {"step": 2, "base": {"name_or_path": str(base), "revision": None}, **said}
    manifest.write(folder / layout.MANIFEST, told)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
