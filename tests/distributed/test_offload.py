"""State in host memory trains, overflows and resumes like state on the device."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.config.schema.precision import PrecisionConfig
from launcher.config.schema.strategy import STRATEGIES
from launcher.config.schema.training import TrainingConfig
from launcher.distributed.gather import gather_to_main
from launcher.distributed.process_group import RankInfo
from launcher.strategy import build_strategy
from launcher.strategy.precision import precision_of
from tests.helpers import optimizers, parts, precision
from tests.helpers.checkpoints import END, STOP, run_steps, six_steps
from tests.helpers.layouts import OFFLOADED, Layout, pairwise
from tests.helpers.parts import Case

LAYOUTS: list[Layout] = [  # that test_matrix.py omits
    ("fsdp_offload", 1, {}),
    ("zero2_offload", 1, {}),
    ("zero3_offload", 3, {}),
    ("zero3", 2, {"offload_param": "cpu", "persistence_threshold": 0}),
    ("zero3", 2, {"offload_optimizer": "cpu"}),
]


@pytest.mark.parametrize(
    ("method", "strategy", "world", "options"), pairwise(LAYOUTS, ["full", "lora"])
)
def test_losses_equal_a_plain_loop(
    ranks: Any, tiny: Path, rows_file: Path, method: str, strategy: str, world: int, options: Any
) -> None:
    """20 steps in fp32: accumulation, uneven lengths, short last steps, clipping, warm-up."""
    plain = Case(tiny, rows_file, method=method, global_batch_size=12)
    case = dataclasses.replace(plain, strategy=strategy, strategy_options=options)
    expected = parts.expected_losses(plain)
    for found in ranks.run(world, parts.losses, case):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("lora", ("zero3_offload", 2), ("fsdp", 3)),
        ("full", ("fsdp_offload", 3), ("zero2_offload", 2)),
    ],
)
def test_a_run_resumes_with_and_without_offload(
    ranks: Any,
    tiny: Path,
    rows_file: Path,
    tmp_path: Path,
    method: str,
    before: tuple[str, int],
    after: tuple[str, int],
) -> None:
    case = six_steps(tiny, rows_file, method, before[0])
    case = dataclasses.replace(case, method_options={})  # other ranks draw other dropout masks
    whole = ranks.run(before[1], run_steps, case, tmp_path / "whole", 0, END)[0]
    ranks.run(before[1], run_steps, case, tmp_path / "parts", 0, STOP)
    case = dataclasses.replace(case, strategy=after[0])
    found = ranks.run(after[1], run_steps, case, tmp_path / "parts", STOP, END)[0]
    assert found == pytest.approx(whole[STOP:], rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [
        *((optimizer, OFFLOADED[0]) for optimizer in ("sgd", "lion", "adamw_8bit")),
        ("sgd", OFFLOADED[3]),
        ("lion", OFFLOADED[2]),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else each,
)
def test_other_optimizers_also_step_in_host_memory(
    ranks: Any, tiny: Path, rows_file: Path, optimizer: str, layout: Layout
) -> None:
    strategy, world, options = layout
    plain = optimizers.case_of(tiny, rows_file, optimizer, method="full", steps=10)
    case = dataclasses.replace(plain, strategy=strategy, strategy_options=options)
    expected = optimizers.expected_losses(plain)
    for found in ranks.run(world, parts.losses, case):
        assert found == pytest.approx(expected, rel=optimizers.BOUNDS[optimizer])


@pytest.fixture
def fp16(ranks: Any) -> None:
    ranks.run(4, precision.allow_fp16)


@pytest.mark.whole
@pytest.mark.usefixtures("fp16")
def test_fp16_scales_equal_those_of_ddp(ranks: Any, tiny: Path, rows_file: Path) -> None:
    layouts = [("ddp", 2, {}), *((strategy, 2, options) for strategy, _, options in OFFLOADED)]
    found = []
    for layout in layouts:
        case = precision.case_of(
            tiny, rows_file, layout, "fp16", precision_options=precision.HUGE, steps=24
        )
        answers = ranks.run(2, precision.scales_and_losses, case)
        assert all(answer == answers[0] for answer in answers), "all ranks agree"
        found.append(answers[0])
    (scales, losses), *others = found
    assert {applied for _, applied in scales} == {True, False}
    for other, more in others:
        assert other == scales
        assert more == pytest.approx(losses, rel=2e-2)


@pytest.mark.usefixtures("fp16")
@pytest.mark.parametrize("layout", OFFLOADED, ids=lambda layout: layout[0])
def test_an_overflow_on_one_rank_makes_all_skip_the_step(
    ranks: Any, tiny: Path, rows_file: Path, layout: Layout
) -> None:
    options = {"initial_scale_power": 8, "hysteresis": 1}
    case = precision.case_of(tiny, rows_file, layout, "fp16", precision_options=options)
    for answer in ranks.run(layout[1], precision.overflow_on_one_rank, case):
        assert answer == (False, [False, True], 2.0**7)


def poisoned(rank_info: RankInfo, case: Case) -> tuple[bool, bool, bool]:
    """Whether weights changed in a step whose gradient is nan on one rank; whether its norm was
    finite; whether weights changed in the next step."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    before = precision.copies(strategy)
    factor = math.nan if rank_info.rank == 0 else 1.0
    stats = precision.with_factor(strategy, factor, loader.step_batch(0))
    moved = precision.has_moved(strategy, before)
    parts.train_step(strategy, loader.step_batch(1))
    return moved, bool(stats.grad_norm.isfinite()), precision.has_moved(strategy, before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", OFFLOADED, ids=lambda layout: layout[0])
def test_a_gradient_that_is_not_finite_changes_no_weight(
    ranks: Any, tiny: Path, rows_file: Path, layout: Layout, dtype: str
) -> None:
    case = precision.case_of(tiny, rows_file, layout, dtype, method="full")
    assert ranks.run(layout[1], poisoned, case) == [(False, False, True)] * layout[1]


class Branches(nn.Module):
    """`b` is used only in some steps, like an expert that no token is routed to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8, bias=False)

    def forward(self, both: bool) -> torch.Tensor:
        y = self.a(torch.ones(2, 8))
        return (self.b(y) if both else y).square().mean()


SCHEDULE = (True, False, True)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)


def branching(rank_info: RankInfo, name: str) -> list[dict[str, torch.Tensor]] | None:
    """The weights after each step of two micro-batches."""
    training = TrainingConfig(global_batch_size=2 * rank_info.world_size, micro_batch_size=1)
    fp32 = precision_of(PrecisionConfig(name="fp32"))
    strategy = build_strategy(STRATEGIES[name](name=name), training, rank_info, fp32)
    strategy.setup(Branches(), None, lambda trained: adamw([p for _, p, _ in trained]))
    found = []
    for both in SCHEDULE:
        for last in (False, True):
            strategy.set_last_micro_batch(last)
            strategy.backward(strategy.model(both))
        strategy.step(parts.MAX_NORM)
        shards = strategy.weights()
        found.append(
            gather_to_main(
                {n: dataclasses.replace(s, local=s.local.clone()) for n, s in shards.items()}
            )
        )
    return found if rank_info.is_main else None  # type: ignore[return-value]


@pytest.mark.parametrize("strategy", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_an_unused_parameter_is_not_updated_by_an_old_gradient(ranks: Any, strategy: str) -> None:
    """DeepSpeed's buffers still contain it. With a gradient of zero, moments decay."""
    found, _ = ranks.run(2, branching, strategy)
    model = Branches()
    optimizer = adamw(list(model.parameters()))
    for both, weights in zip(SCHEDULE, found, strict=True):
        (4 * model(both)).backward()
        if not both:
            model.b.weight.grad = torch.zeros_like(model.b.weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), parts.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-4, atol=1e-5)
