"""Chat targets made from the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.chat import write_checkpoint


@pytest.fixture
def run(adapter: Path, tiny: Path, tmp_path: Path) -> Path:
    """The folder of a run with an unfinished and a finished checkpoint of an adapter."""
    folder = tmp_path / "run"
    write_checkpoint(folder / "checkpoints/step-000002", adapter, tiny)
    (folder / "checkpoints/step-000004").mkdir()
    (folder / "config.yaml").write_text("a: 1\n")
    return folder
