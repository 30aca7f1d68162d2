"""The ranks of a place: the session's gloo ranks, or ranks that have a GPU each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.places import Place
from tests.helpers.pool import RankPool

TOOLS = Path(__file__).parents[2] / "tools"
MOST_RANKS = 2


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[RankPool]:
    """A rank for each GPU, two at most, for the session: CUDA starts once."""
    pool = RankPool(min(MOST_RANKS, torch.cuda.device_count()), device="cuda")
    yield pool
    pool.close()


@pytest.fixture
def enough_gpus(place: Place) -> None:
    """Skip the test if this machine has too few GPUs."""
    if place.on_gpu and torch.cuda.device_count() < place.ranks:
        pytest.skip(f"needs {place.ranks} CUDA device(s), found {torch.cuda.device_count()}")


@pytest.fixture
def pool(place: Place, enough_gpus: None, request: pytest.FixtureRequest) -> RankPool:
    """The pool of the place."""
    found: RankPool = request.getfixturevalue("gpu_ranks" if place.on_gpu else "ranks")
    return found


@pytest.fixture
def run(place: Place, pool: RankPool) -> Any:
    """`run(function, *args)`: the results of all ranks of the place."""
    return partial(pool.run, place.ranks)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models whose heads and experts have sizes that GPU kernels know: a Llama, and one
    with experts and with buffers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        random_model = importlib.import_module("random_model")
    folder = tmp_path_factory.mktemp("models")
    for shape in ("tiny", "tiny_moe"):
        random_model.make(shape, folder / shape)
    return {"llama": folder / "tiny", "experts": folder / "tiny_moe"}
