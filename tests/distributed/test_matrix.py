"""Methods × strategies × precisions × accumulation × evaluation: every cell trains as one process
does, shards what its strategy promises, keeps its dtypes and resumes from a save bit for bit.

`make test` runs cells that contain every pair of values, `make test-all` runs all cells.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import AutoModelForCausalLM

from launcher.config import Config
from launcher.config.rules.table import broken_rules
from launcher.config.schema.strategy import STRATEGIES
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.strategy import build_strategy
from launcher.strategy.precision import precision_of
from tests.helpers import matrix, parts
from tests.helpers.matrix import END, METHODS, PRECISIONS, SAVE, Cell, Seen
from tests.helpers.pairs import cover
from tests.helpers.precision import allow_fp16
from tests.helpers.quantized import round_trip

GRID = [
    Cell(*values)
    for values in itertools.product(METHODS, STRATEGIES, PRECISIONS, (False, True), (False, True))
]


# Rule → what it refuses under which strategies. All other cells can run.
REFUSED = {
    "dora-without-zero3": ("dora", "zero3.*"),
    "zero-offload-keeps-fp32": ("pure_bf16", "zero[23]_offload"),
}


def refusals(cell: Cell) -> set[str]:
    return {
        rule
        for rule, (value, strategies) in REFUSED.items()
        if value in cell and re.fullmatch(strategies, cell.strategy)
    }


RUNNING = [cell for cell in GRID if not refusals(cell)]
CHOSEN = set(cover(RUNNING))
CELLS = [
    pytest.param(cell, id=str(cell), marks=() if cell in CHOSEN else pytest.mark.whole)
    for cell in RUNNING
]

# Relative difference of a loss from that of one process in the same precision. Over every method,
# strategy and precision the largest were 2.6e-7, 7.0e-5, 7.3e-6 and 8.4e-5.
BOUNDS = {"fp32": 1e-6, "bf16": 2e-4, "fp16": 2e-5, "pure_bf16": 2.5e-4}
# The same, from that of one process in fp32: they were 2.6e-7, 2.7e-4, 2.1e-5 and 4.8e-4.
ROUNDING = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 6e-5, "pure_bf16": 1.5e-3}
DTYPES = {  # (of arithmetic and frozen weights, of trained weights and moments)
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "pure_bf16": (torch.bfloat16, torch.bfloat16),
}
PACKED = {"nf4": torch.uint8, "int8": torch.int8}


@pytest.fixture(scope="module", autouse=True)
def fp16(ranks: Any) -> None:
    """DeepSpeed reports no fp16 on most CPUs; here that report is overridden."""
    ranks.run(4, allow_fp16)


@pytest.fixture(scope="module")
def alone(ranks: Any, tiny: Path, rows_file: Path) -> Callable[[str, str], list[float]]:
    """The losses of a method in one process: from a plain PyTorch loop in fp32, from
    strategy=single in other precisions."""

    @functools.cache
    def losses(method: str, precision: str) -> list[float]:
        if precision == "fp32":
            return plain_losses(method, rows_file)
        config = Cell(method, "single", precision).config(rows_file)
        (found,) = ranks.run(1, matrix.losses, config)
        return found  # type: ignore[no-any-return]

    return losses


def plain_losses(method: str, data: Path) -> list[float]:
    """For a quantized base: with its dequantized weights, which bitsandbytes computes."""
    unpacked = "lora" if method in PACKED else method
    case = matrix.plain_case(Cell(unpacked, "single", "fp32").config(data))
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    if method in PACKED:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.data = round_trip(module.weight.data, method)
    return parts.plain_losses(case, case.build_method().prepare(model, parts.SEED))


@pytest.mark.parametrize("cell", CELLS)
def test_cell_trains_like_one_process(
    ranks: Any,
    rows_file: Path,
    tmp_path: Path,
    alone: Callable[[str, str], list[float]],
    cell: Cell,
) -> None:
    config = cell.config(rows_file)
    seen = ranks.run(cell.world.size, matrix.run, config, tmp_path, cell.evaluated)
    for rank in seen:
        check_losses(cell, rank, alone)
        check_going_on(rank)
        check_dtypes(cell, rank)
        assert (rank.steps, rank.evaluations) == (seen[0].steps, seen[0].evaluations)
    check_shards(cell, seen)


def check_losses(cell: Cell, rank: Seen, alone: Callable[[str, str], list[float]]) -> None:
    losses = [step["loss"] for step in rank.steps]
    assert losses == pytest.approx(alone(cell.method, cell.precision), rel=BOUNDS[cell.precision])
    assert losses == pytest.approx(alone(cell.method, "fp32"), rel=ROUNDING[cell.precision])
    assert losses[-1] < 0.99 * losses[0]
    assert not any("skipped" in step for step in rank.steps)
    assert len(rank.evaluations) == (2 if cell.evaluated else 0)
    assert rank.evaluations == sorted(rank.evaluations, reverse=True), "they fall too"


def check_going_on(rank: Seen) -> None:
    """Losses, norms and state are equal to the bit; an evaluation after the save makes no
    difference."""
    assert len(rank.rest) == END - SAVE
    assert rank.rest == rank.steps[SAVE:]
    assert rank.state[0] == rank.state[1]


def check_dtypes(cell: Cell, rank: Seen) -> None:
    compute, master = DTYPES[cell.precision]
    assert rank.dtypes == {
        "trained": {master},
        "moments": {master},
        "frozen": set() if cell.method == "full" else {compute},
        "packed": {PACKED[cell.method]} if cell.method in PACKED else set(),
        "compute": {compute},
    }


def check_shards(cell: Cell, seen: list[Seen]) -> None:
    """No rank holds more than its share, except for uneven rows and padding; nothing is lost."""
    for what, shards in cell.shards.items():
        held = [rank.sizes[what][0] for rank in seen]
        (whole,) = {rank.sizes[what][1] for rank in seen}
        assert max(held) <= 1.01 * whole / shards, what
        assert sum(held) >= whole * len(seen) / shards, what


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
