"""Packed sequences train like separate rows, under every strategy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.distributed.process_group import RankInfo
from launcher.training.model_checks import check_document_masking
from tests.helpers import parts
from tests.helpers.parts import Case

# All thirteen rows in one step, so that packed and unpacked steps train on the same rows.
CASE = {"global_batch_size": 16, "micro_batch_size": 4, "steps": 6, "learning_rate": 3e-3}


def shapes(rank_info: RankInfo, case: Case) -> list[tuple[int, ...]]:
    step_batch = case.loader(rank_info.rank, rank_info.world_size).step_batch(0)
    return [tuple(batch.input_ids.shape) for batch in step_batch.micro_batches]


@pytest.mark.parametrize(
    ("strategy", "world", "options"),
    [
        ("single", 1, {}),
        ("ddp", 2, {}),
        ("fsdp", 2, {"training_options": {"activation_checkpointing": "full"}}),
        ("fsdp", 3, {"method": "full"}),
        ("zero2", 2, {"method": "full"}),
        ("zero3", 2, {}),
    ],
)
def test_losses_equal_those_of_unpacked_rows(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int, options: dict[str, Any]
) -> None:
    case = Case(tiny, rows_file, strategy=strategy, **CASE, **options)
    packed = replace(case, packing=True)
    (plain,) = ranks.run(1, parts.losses, replace(case, strategy="single"))
    for found in ranks.run(world, parts.losses, packed):
        assert found == pytest.approx(plain, rel=2e-5)
    assert plain[-1] < plain[0] - 0.05
    computed = [
        sum(rows * width for each in ranks.run(1, shapes, one) for rows, width in each)
        for one in (case, packed)
    ]
    assert computed[1] < computed[0], "with less padding"


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_the_packing_check_of_a_sharded_model_does_not_change_training(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str
) -> None:
    case = Case(tiny, rows_file, strategy=strategy, packing=True, **CASE)
    expected = ranks.run(2, parts.losses, case)
    assert ranks.run(2, losses_after_trial, case) == expected


def losses_after_trial(rank_info: RankInfo, case: Case) -> list[float]:
    train_state, loader = parts.set_up(rank_info, case)
    check_document_masking(train_state.strategy.model, rank_info.device, 259, torch.float32)
    recorder = parts.Recorder()
    parts.fit(train_state, loader, parts.plan(case.steps), recorder)
    return recorder.column("loss")
