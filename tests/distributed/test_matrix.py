"""Methods × strategies × precisions × accumulation × evaluation: every cell trains as one process
does, shards what its strategy promises, keeps its dtypes and resumes from a save bit for bit.

`make test` runs cells that contain every pair of values, `make test-all` runs all cells.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from launcher.config import Config
from launcher.config.rules.table import broken_rules
from launcher.config.schema.strategy import STRATEGIES
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.strategy import build_strategy
from launcher.strategy.precision import precision_of
from tests.helpers import matrix, matrix_checks
from tests.helpers.matrix import METHODS, Cell
from tests.helpers.matrix_checks import GRID, RUNNING, Alone, refusals
from tests.helpers.pairs import cover
from tests.helpers.precision import allow_fp16

CHOSEN = set(cover(RUNNING))
CELLS = [
    pytest.param(cell, id=str(cell), marks=() if cell in CHOSEN else pytest.mark.whole)
    for cell in RUNNING
]


@pytest.fixture(scope="module", autouse=True)
def fp16(ranks: Any) -> None:
    """DeepSpeed reports no fp16 on most CPUs; here that report is overridden."""
    ranks.run(4, allow_fp16)


@pytest.fixture(scope="module")
def alone(ranks: Any, tiny: Path, rows_file: Path) -> Alone:
    return matrix_checks.losses_alone(ranks, rows_file)


@pytest.mark.parametrize("cell", CELLS)
def test_cell_trains_like_one_process(
    ranks: Any,
    rows_file: Path,
    tmp_path: Path,
    alone: Alone,
    cell: Cell,
) -> None:
    config = cell.config(rows_file)
    seen = ranks.run(cell.world.size, matrix.run, config, tmp_path, cell.evaluated)
    for rank in seen:
        matrix_checks.check_losses(cell, rank, alone)
        matrix_checks.check_going_on(cell, rank)
        matrix_checks.check_dtypes(cell, rank)
        assert (rank.steps, rank.evaluations) == (seen[0].steps, seen[0].evaluations)
    matrix_checks.check_shards(cell, seen)


def test_make_test_covers_every_allowed_pair_of_values() -> None:
    def store(cells: Any) -> set[Any]:
        axes = range(len(Cell._fields))
        return {(a, cell[a], b, cell[b]) for cell in cells for a in axes for b in range(a)}

    assert store(CHOSEN) == store(RUNNING)
    assert len(CHOSEN) <= len(METHODS) * len(STRATEGIES), "about as few as can be"


def test_the_rules_refuse_the_other_cells_with_a_message(tiny: Path, rows_file: Path) -> None:
    for cell in GRID:
        lines = broken_rules(cell.config(rows_file), cell.world)
        said = [re.fullmatch(r"(.+) → ([a-z_.]+=.+) \[([a-z0-9-]+)\]", line) for line in lines]
        assert {each[3] for each in said if each} == refusals(cell), (cell, lines)
        assert all(each and f"strategy={cell.strategy}" in each[1] for each in said), lines


def said_without_fp16(rank_info: RankInfo, configs: list[Config]) -> list[str]:
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
        for each in configs:
            with pytest.raises(UserError) as refused:
                build_strategy(
                    each.strategy, each.training, rank_info, precision_of(each.precision)
                )
            said.append(str(refused.value))
    return said


def test_fp16_under_zero_is_refused_if_deepspeed_does_not_support_it(
    ranks: Any, tiny: Path, rows_file: Path
) -> None:
    names = [name for name in STRATEGIES if name.startswith("zero")]
    configs = [Cell("lora", name, "fp16").config(rows_file) for name in names]
    (said,) = ranks.run(1, said_without_fp16, configs)
    assert said == [
        f"precision=fp16 with strategy={name}: DeepSpeed does not support fp16 on cpu; "
        "choose precision=bf16, or strategy=fsdp"
        for name in names
    ]
