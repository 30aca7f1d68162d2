"""Parameters on disk train and resume like parameters in memory. Needs libaio and a compiler."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cluster.build_ops import build_async_io
from launcher.cluster.devices import has_libaio
from launcher.distributed.process_group import RankInfo
from launcher.folders.run import RunDir
from launcher.strategy import Strategy
from launcher.training import loop
from tests.helpers import parts
from tests.helpers.checkpoints import END, STOP, run_steps
from tests.helpers.parts import Case
from tests.helpers.wide import make_wide

pytestmark = [
    pytest.mark.whole,  # the first run compiles for minutes
    pytest.mark.skipif(not has_libaio(), reason="no libaio"),
]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = RunDir(tmp_path_factory.mktemp("run"))
    run.logs.mkdir(parents=True)
    build_async_io(run)


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed keeps tensors of less than 1 MB per rank in memory."""
    return make_wide(tiny, tmp_path_factory.mktemp("models") / "wide", layers=2)


def on_disk(strategy: Strategy) -> list[str]:
    """Parameters that exist and are not in memory."""
    return [
        name
        for name, parameter in strategy.model.named_parameters()
        if parameter.ds_tensor.final_location == "nvme" and parameter.ds_tensor.numel() <= 1
    ]


def learn(rank_info: RankInfo, case: Case) -> tuple[list[float], list[str]]:
    """Losses of training, of an evaluation and of one more step; what is on disk afterward."""
    train_state, losses = parts.train(rank_info, case)
    strategy, loader = train_state.strategy, case.loader(rank_info.rank, rank_info.world_size)
    found = loop.evaluate(strategy, loader, torch.device("cpu"))
    assert found is not None
    losses.append(found)
    losses.append(strategy.sum(parts.train_step(strategy, loader.step_batch(0)).loss).item())
    return losses, on_disk(strategy)


def case_of(wide: Path, rows_file: Path, method: str, **options: Any) -> Case:
    split = {"persistence_threshold": 0}
    return Case(
        wide, rows_file, method=method, strategy="zero3", strategy_options=split, precision="bf16",
        learning_rate=1e-4, global_batch_size=12, **options,
    )  # fmt: skip


def swapping(case: Case, folder: Path, **more: Any) -> Case:
    settings = {"offload_param": "nvme", "nvme_path": str(folder), "nvme_buffer_size": 2_000_000}
    return dataclasses.replace(case, strategy_options={**case.strategy_options, **settings, **more})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_equal_those_without_nvme(
    ranks: Any, wide: Path, rows_file: Path, tmp_path: Path, method: str, precision: str
) -> None:
    case = case_of(wide, rows_file, method, steps=3)
    case = dataclasses.replace(case, precision=precision)
    case = case.with_training(activation_checkpointing="2")
    expected = ranks.run(2, learn, case)
    found = ranks.run(2, learn, swapping(case, tmp_path))
    for (losses, swapped), (without, none) in zip(found, expected, strict=True):
        assert losses == without
        assert sum("mlp" in name for name in swapped) == 6, "the large ones, frozen or not"
        assert not none
    assert len(list(tmp_path.rglob("rank1/*.swp"))) >= 6


@pytest.mark.parametrize("method", ["full", "lora"])
def test_stop_and_resume_is_exact_to_the_bit(
    ranks: Any, wide: Path, rows_file: Path, tmp_path: Path, method: str
) -> None:
    case = swapping(case_of(wide, rows_file, method), tmp_path, offload_optimizer="cpu")
    whole = ranks.run(2, run_steps, case, tmp_path / "whole", 0, END)
    first = ranks.run(2, run_steps, case, tmp_path / "parts", 0, STOP)
    second = ranks.run(2, run_steps, case, tmp_path / "parts", STOP, END)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
