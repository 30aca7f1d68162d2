"""training.tf32 and training.deterministic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config.schema.training import TrainingConfig
from launcher.distributed.process_group import RankInfo
from launcher.training.arithmetic import set_arithmetic
from tests.helpers import parts
from tests.helpers.parts import Case


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    _restore()


def _restore() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = False


def test_by_default_nothing_changes() -> None:
    assert set_arithmetic(TrainingConfig()) == ""
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


def test_tf32_is_for_matrix_products_in_fp32() -> None:
    assert "TF32 (training.tf32=true)" in set_arithmetic(TrainingConfig(tf32=True))
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "high", "other libraries may still ask"


def test_deterministic_selects_algorithms_and_refuses_others() -> None:
    line = set_arithmetic(TrainingConfig(deterministic=True))
    assert "sums in a fixed order (training.deterministic=true)" in line
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic


def _losses(rank_info: RankInfo, case: Case) -> list[float]:
    config = case.config()
    set_arithmetic(config.training)
    try:
        train_state, loader = parts.build(rank_info, config)
        recorder = parts.Recorder()
        parts.fit(train_state, loader, parts.plan(case.steps), recorder)
        return recorder.column("loss")
    finally:
        _restore()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_every_operation_of_a_step_has_a_deterministic_form(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str
) -> None:
    """On CPU the losses are those of a run without it, to the bit."""
    case = Case(tiny, rows_file, method="full", strategy=strategy, steps=3)
    fixed = replace(case, training_options={"deterministic": True})
    assert ranks.run(2, _losses, fixed) == ranks.run(2, parts.losses, case)
