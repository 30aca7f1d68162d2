"""The cells of tests/distributed/test_matrix.py on GPUs: every pair of method, strategy and
precision trains as one process does, keeps its dtypes and its share, and resumes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import matrix, matrix_checks
from tests.helpers.matrix import Cell
from tests.helpers.matrix_checks import RUNNING, Alone
from tests.helpers.pairs import cover
from tests.helpers.places import GPU, TWO_GPUS, Place, placed
from tests.helpers.pool import RankPool

ON_CPU = [Cell("lora", "fsdp", "bf16", evaluated=True)]
CELLS = cover(RUNNING)
SHARDED = [cell for cell in CELLS if cell.strategy != "single"]


@pytest.fixture(scope="module")
def alone_on(tiny: Path, rows_file: Path) -> Callable[[RankPool], Alone]:
    """The losses of one process of a pool, computed once."""
    return functools.cache(lambda pool: matrix_checks.losses_alone(pool, rows_file))


@pytest.mark.parametrize(("place", "cell"), placed(CELLS, ON_CPU, SHARDED))
def test_cell_trains_like_one_process(
    run: Any,
    pool: RankPool,
    rows_file: Path,
    tmp_path: Path,
    alone_on: Any,
    place: Place,
    cell: Cell,
) -> None:
    config = cell.config(rows_file, place.ranks)
    seen = run(matrix.run, config, tmp_path, cell.evaluated)
    for rank in seen:
        matrix_checks.check_losses(cell, rank, alone_on(pool), place.on_gpu)
        matrix_checks.check_going_on(cell, rank, place.on_gpu)
        matrix_checks.check_dtypes(cell, rank)
        assert (rank.steps, rank.evaluations) == (seen[0].steps, seen[0].evaluations)
    matrix_checks.check_shards(cell, seen)


def test_the_rules_allow_the_cells(tiny: Path, rows_file: Path) -> None:
    for place, cells in ((GPU, CELLS), (TWO_GPUS, SHARDED)):
        for cell in cells:
            assert place.refusals(cell.config(rows_file, place.ranks)) == [], (place, cell)
