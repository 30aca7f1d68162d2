"""Fixtures of the tests on a CUDA device that does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.fake_cuda import build
from tests.helpers.fake_cuda.cells import write_models

NO_COMPILER = "no C++ compiler to build the guard of the fake CUDA device: install g++, or set CXX"


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    if build.compiler() is None:
        pytest.skip(NO_COMPILER)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each model."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder
