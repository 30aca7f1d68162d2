"""Every strategy computes what a plain PyTorch loop computes, and shards what it promises."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from launcher.distributed.process_group import RankInfo
from launcher.training.loss import token_loss
from tests.helpers import parts
from tests.helpers.layouts import Layout, pairwise
from tests.helpers.parts import Case
from tests.helpers.sizes import held_bytes, zero_elements

NO_CLIPPING = 1e9
GRID: list[Layout] = [
    ("single", 1, {}),
    ("ddp", 1, {}),
    ("ddp", 2, {}),
    ("ddp", 3, {}),
    ("fsdp", 1, {}),
    ("fsdp", 2, {}),
    ("fsdp", 3, {}),
    ("hsdp", 1, {"shard_size": 1}),
    ("hsdp", 2, {"shard_size": 2}),
    ("hsdp", 3, {"shard_size": 1}),
    ("hsdp", 4, {"shard_size": 2}),
    *((f"zero{stage}", world, {}) for stage in (1, 2, 3) for world in (1, 2, 3)),
]


@functools.cache
def expected_gradients(case: Case) -> dict[str, torch.Tensor]:
    return parts.plain_gradients(case)


def first_gradients(rank_info: RankInfo, case: Case) -> tuple[dict[str, torch.Tensor], float]:
    """The full gradients of step 1 as the optimizer would see them before clipping, and their norm
    as the step reports it."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    assert ("one rank" in strategy.describe()) == (rank_info.world_size == 1)
    step_batch = loader.step_batch(0)
    targets = strategy.sum(step_batch.target_tokens)
    for index, batch in enumerate(step_batch.micro_batches, start=1):
        strategy.set_last_micro_batch(last=index == len(step_batch.micro_batches))
        strategy.backward(token_loss(strategy.model, batch) / targets)
    if case.strategy.startswith("zero"):
        return reduced_gradients(strategy)
    gradients: dict[str, Any] = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in strategy.model.named_parameters()
        if p.requires_grad
    }
    return gradients, strategy.step(NO_CLIPPING).grad_norm.item()


def reduced_gradients(strategy: Any) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients that DeepSpeed's optimizer is about to receive, from all ranks; their norm."""
    found: dict[str, torch.Tensor] = {}
    # Before the step: during it, the engine shows the optimizer one group at a time.
    take, flats, weights = strategy.optimizer.step, strategy._flat_masters, strategy.weights()

    def spy(*args: Any, **kwargs: Any) -> Any:
        for name, shard in weights.items():
            run = strategy._flat_range(strategy._trained[name])
            grad = flats[run[0]].grad
            if grad is not None and name not in found:
                whole = torch.zeros(shard.shape).flatten()
                whole[run[2] : run[2] + run[3]] = grad[run[1] : run[1] + run[3]]
                found[name] = whole.view(shard.shape)
        return take(*args, **kwargs)

    strategy.optimizer.step = spy
    norm = strategy.step(NO_CLIPPING).grad_norm.item()
    return {name: strategy.sum(part) for name, part in sorted(found.items())}, norm


def case_of(tiny: Path, rows_file: Path, **options: Any) -> Case:
    return Case(model=tiny, data=rows_file, **options)


@pytest.mark.parametrize(
    ("method", "strategy", "world", "options"), pairwise(GRID, ["full", "lora"])
)
def test_losses_equal_a_plain_loop(
    ranks: Any, tiny: Path, rows_file: Path, method: str, strategy: str, world: int, options: Any
) -> None:
    """20 steps in fp32: accumulation, uneven lengths, short last steps, clipping, warm-up."""
    plain = case_of(tiny, rows_file, method=method, global_batch_size=12 if world == 4 else 6)
    case = dataclasses.replace(plain, strategy=strategy, strategy_options=options)
    expected = parts.expected_losses(plain)
    for found in ranks.run(world, parts.losses, case):
        assert found == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(
    ("method", "strategy", "world", "options"), pairwise(GRID, ["full", "lora"])
)
def test_first_gradients_and_their_norm_equal_a_plain_loop(
    ranks: Any, tiny: Path, rows_file: Path, method: str, strategy: str, world: int, options: Any
) -> None:
    plain = case_of(tiny, rows_file, method=method, global_batch_size=12 if world == 4 else 6)
    case = dataclasses.replace(plain, strategy=strategy, strategy_options=options)
    expected = expected_gradients(plain)
    norm = torch.nn.utils.get_total_norm(list(expected.values())).item()
    for found, found_norm in ranks.run(world, first_gradients, case):
        assert found_norm == pytest.approx(norm, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3


@pytest.mark.parametrize("sync", ["every", "last"])
def test_gradient_sync_does_not_change_the_losses(
    ranks: Any, tiny: Path, rows_file: Path, sync: str
) -> None:
    case = case_of(
        tiny, rows_file, method="full", strategy_options={"gradient_sync": sync}, steps=5
    )
    expected = parts.expected_losses(case_of(tiny, rows_file, method="full", steps=5))
    assert ranks.run(2, parts.losses, case)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("world", [2, 3])
def test_fsdp_shards_parameters_and_moments(
    ranks: Any, tiny: Path, rows_file: Path, method: str, world: int
) -> None:
    """Rank 0 holds exactly its share, no rank holds more, and all ranks hold one copy."""
    case = case_of(tiny, rows_file, method=method, strategy="fsdp")
    held = ranks.run(world, held_bytes, case, world)
    (alone,) = ranks.run(1, held_bytes, case)
    for what in ("parameters", "moments"):
        assert sum(rank[what] for rank in held) == alone[what]
        assert max(rank[what] for rank in held) == held[0][what] == held[0][f"promised {what}"]
        assert held[0][what] < 0.67 * alone[what]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_hsdp_shards_inside_groups_and_ddp_shards_nothing(
    ranks: Any, tiny: Path, rows_file: Path, method: str
) -> None:
    options = {"method": method, "global_batch_size": 12}
    (alone,) = ranks.run(1, held_bytes, case_of(tiny, rows_file, strategy="single", **options))
    half = ranks.run(
        4,
        held_bytes,
        case_of(tiny, rows_file, strategy="hsdp", strategy_options={"shard_size": 2}, **options),
        2,
    )
    whole = ranks.run(2, held_bytes, case_of(tiny, rows_file, strategy="ddp", **options))
    for what in ("parameters", "moments"):
        assert sum(rank[what] for rank in half) == 2 * alone[what]
        assert max(rank[what] for rank in half) == half[0][f"promised {what}"]
        assert [rank[what] for rank in whole] == [alone[what]] * 2


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_the_state_of_its_stage(
    ranks: Any, tiny: Path, rows_file: Path, method: str, world: int, stage: int
) -> None:
    """All ranks hold one copy of master weights and moments; under zero3 also of the parameters."""
    options = {"persistence_threshold": 0} if stage == 3 else {}
    case = case_of(
        tiny, rows_file, method=method, strategy=f"zero{stage}", strategy_options=options
    )
    model = parts.plain_model(case)
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = len(list(model.parameters()))
    held = ranks.run(world, zero_elements, case)
    assert sum(rank["masters"] for rank in held) == trained
    assert sum(rank["moments"] for rank in held) == 2 * trained
    assert max(rank["flat"] for rank in held) <= trained / world + tensors * world, "but padding"
    for rank in held:
        assert rank["whole"] == (0 if stage == 3 else every)
    if stage == 3:
        most = max(rank["partitions"] for rank in held)
        assert every / world <= most <= every / world + tensors * world


def test_the_same_seed_gives_the_same_bits(ranks: Any, tiny: Path, rows_file: Path) -> None:
    case = case_of(tiny, rows_file, method_options={"dropout": 0.1}, steps=6)
    assert ranks.run(2, parts.losses, case) == ranks.run(2, parts.losses, case)
