"""A pipe in place of a file is refused at every door; nothing waits for its writer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config import store
from launcher.folders import manifest
from launcher.folders.json_file import read_object
from launcher.folders.tensor_entries import read_header
from launcher.io.readers.torch_file import read_file, unpickle
from launcher.io.tensor.disk import read_buffered
from launcher.run.metrics import Glance

DOORS: dict[str, Callable[[Path], Any]] = {
    "settings": read_object,
    "configuration": store.load,
    "safetensors": read_header,
    "torch file": read_file,
    "pickle": unpickle,
    "tensor": lambda path: read_buffered(path, 0, 1),
    "checksum": manifest.checksum,
}


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("name", DOORS)
def test_a_pipe_is_refused_by_its_name(name: str, pipe: Path) -> None:
    message = r"pipe.*not a regular file|not a regular.*pipe"
    with pytest.raises((ValueError, OSError), match=message):
        DOORS[name](pipe)


def test_a_pipe_in_place_of_metrics_is_damaged(pipe: Path) -> None:
    assert Glance.of(pipe).is_damaged
