"""Fixtures of the tests on a CUDA device that does not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.helpers.fake_cuda import Case, Seen, build, run
from tests.helpers.fake_cuda.cells import write_models

NO_COMPILER = "no C++ compiler to build the guard of the fake CUDA device: install g++, or set CXX"


class Cell(Protocol):
    """A value of the parameter `cell`."""

    def case(self, models: Path) -> Case: ...


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


@pytest.fixture(scope="module")
def look(models: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[Cell], Seen]]:
    """What a cell does. One process runs the cells of all tests of a file, in their order."""
    items = [each for each in request.session.items if each.path == request.path]
    cells = [
        each.callspec.params["cell"]
        for each in items
        if isinstance(each, pytest.Function) and hasattr(each, "callspec")
    ]
    stream = run([cell.case(models) for cell in cells])
    found: dict[Cell, Seen] = {}

    def seen_of(cell: Cell) -> Seen:
        while cell not in found:
            found[cells[len(found)]] = next(stream)
        return found[cell]

    yield seen_of
    stream.close()
