"""The loss scale is alike under every strategy, and gradients that overflow harm nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from launcher.config.precision import Fp16Config
from launcher.distributed.process_group import Place
from launcher.errors import UserError
from launcher.loss_scale import LossScale
from launcher.meter import Work
from launcher.metrics import Ledger, StepStats
from launcher.nonfinite import first_bad_module
from tests.distributed.test_resume import END, STOP, run_steps
from tests.helpers import parts
from tests.helpers.layouts import ONE_OF_EACH
from tests.helpers.parts import Case

# A gradient is scaled by the ranks too, whose mean is taken: the same ranks overflow alike.
AT_TWO = [
    *((name, 2, ()) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
    ("hsdp", 2, (("shard_size", 2),)),
]
HUGE = (("initial_scale_power", 30), ("growth_window", 4))


def allow_fp16(place: Place) -> None:
    """DeepSpeed reports no fp16 on most CPUs, whose arithmetic torch has all the same."""
    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def fp16(ranks: Any) -> None:
    ranks.run(4, allow_fp16)


def case_of(tiny: Path, rows: Path, layout: Any, precision: str, **options: Any) -> Case:
    strategy, _, strategy_options = layout
    return Case(
        tiny, rows, strategy=strategy, strategy_options=strategy_options, precision=precision,
        **options,
    )  # fmt: skip


def scales_and_losses(place: Place, case: Case) -> tuple[list[Any], list[float]]:
    """(scale, whether applied) and loss of every step."""
    strategy, _, loader = parts.set_up(place, case)
    strategy.model.train()
    scales, losses = [], []
    for step in range(case.steps):
        stats = parts.train_step(strategy, loader.window(step))
        scales.append((stats.loss_scale, stats.applied))
        losses.append(strategy.sum(stats.loss).item())
    return scales, losses


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.whole), "lora"])
def test_scales_follow_the_same_sequence_under_every_strategy(
    ranks: Any, tiny: Path, rows_file: Path, method: str
) -> None:
    found = {}
    for layout in AT_TWO:
        case = case_of(
            tiny, rows_file, layout, "fp16", precision_options=HUGE, steps=24, method=method
        )
        answers = ranks.run(2, scales_and_losses, case)
        assert all(answer == answers[0] for answer in answers), "all ranks agree"
        found[layout[0]] = answers[0]
    scales, losses = found["ddp"]
    skipped = [applied for _, applied in scales].count(False)
    assert 5 < skipped < 20, "the first scales overflow, later ones do not"
    assert scales[0] == (2.0**30, False)
    assert len({scale for scale, applied in scales if applied}) > 1, "it grows again"
    assert losses[-1] < losses[0]
    for strategy, (other, more) in found.items():
        assert other == scales, strategy
        assert more == pytest.approx(losses, rel=2e-2), strategy


@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 2), ("zero1", 2), ("zero3", 2)])
def test_a_scale_that_grows_changes_no_step(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    """By powers of two, which scale exactly. DeepSpeed's own grows before it unscales."""
    found = []
    for window in (1, 1000):
        options = (("initial_scale_power", 6), ("growth_window", window))
        case = case_of(
            tiny, rows_file, (strategy, world, ()), "fp16", precision_options=options, steps=8
        )
        found.append(ranks.run(world, scales_and_losses, case)[0])
    (growing, losses), (steady, expected) = found
    assert growing[-1] == (2.0**12, True)
    assert steady[-1] == (2.0**6, True)
    assert losses == pytest.approx(expected, rel=1e-5)


def with_factor(strategy: Any, factor: float, window: Any) -> StepStats:
    """One step whose losses are multiplied on this rank."""
    backward = strategy.backward
    strategy.backward = lambda loss: backward(loss * factor)
    try:
        return parts.train_step(strategy, window)  # type: ignore[no-any-return]
    finally:
        strategy.backward = backward


def has_moved(strategy: Any, before: dict[str, torch.Tensor]) -> bool:
    now = strategy.weights()
    return any(not torch.equal(shard.local, before[name]) for name, shard in now.items())


def copies(strategy: Any) -> dict[str, torch.Tensor]:
    return {name: shard.local.clone() for name, shard in strategy.weights().items()}


def overflow_on_one_rank(place: Place, case: Case) -> tuple[bool, list[bool], float]:
    """Rank 1 alone has an infinite gradient in step 1: whether weights moved in it, whether each
    step was applied, the scale at the end."""
    strategy, _, loader = parts.set_up(place, case)
    before = copies(strategy)
    first = with_factor(strategy, math.inf if place.rank == 1 else 1.0, loader.window(0))
    moved = has_moved(strategy, before)
    second = parts.train_step(strategy, loader.window(1))
    assert strategy.loss_scale is not None
    return moved, [first.applied, second.applied], strategy.loss_scale.scale


@pytest.mark.parametrize("layout", ONE_OF_EACH[1:], ids=lambda layout: layout[0])
def test_an_overflow_on_one_rank_makes_all_skip_the_step(
    ranks: Any, tiny: Path, rows_file: Path, layout: Any
) -> None:
    options = (("initial_scale_power", 8), ("hysteresis", 1))
    case = case_of(tiny, rows_file, layout, "fp16", precision_options=options)
    for answer in ranks.run(layout[1], overflow_on_one_rank, case):
        assert answer == (False, [False, True], 2.0**7)


@pytest.mark.parametrize("layout", [("fsdp", 3, ()), ("zero3", 3, ())], ids=lambda each: each[0])
def test_the_scale_goes_on_with_its_history(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, layout: Any
) -> None:
    options = (("initial_scale_power", 20), ("growth_window", 2))
    case = case_of(
        tiny, rows_file, layout, "fp16", precision_options=options, steps=END, method="full"
    )
    world = layout[1]
    whole = ranks.run(world, run_steps, case, tmp_path / "whole", 0, END)
    first = ranks.run(world, run_steps, case, tmp_path / "parts", 0, STOP)
    second = ranks.run(world, run_steps, case, tmp_path / "parts", STOP, END)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def poisoned(place: Place, case: Case) -> tuple[bool, bool, str]:
    """A step with a gradient that is not finite, without a loss scale: whether weights moved in
    it, and in the next; what is to blame when a weight is not finite."""
    strategy, _, loader = parts.set_up(place, case)
    before = copies(strategy)
    with_factor(strategy, math.nan, loader.window(0))
    moved = has_moved(strategy, before)
    with_factor(strategy, 1.0, loader.window(1))
    moves_on = has_moved(strategy, before)
    with torch.no_grad():
        for name, shard in strategy.weights().items():
            if "layers.1.mlp.up_proj" in name:
                shard.local.fill_(math.nan)
    return moved, moves_on, first_bad_module(strategy.model, loader.window(0), place.device)


@pytest.mark.parametrize("layout", ONE_OF_EACH[:4], ids=lambda layout: layout[0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_changes_no_weight(
    ranks: Any, tiny: Path, rows_file: Path, layout: Any, precision: str
) -> None:
    case = case_of(tiny, rows_file, layout, precision, method="full")
    for moved, moves_on, blame in ranks.run(layout[1], poisoned, case):
        assert (moved, moves_on) == (False, True)
        assert "model.layers.1.mlp.up_proj." in blame


class TestLossScale:
    def test_it_is_deepspeed_s(self) -> None:
        """Over 300 steps of which some overflow, at every window and hysteresis."""
        dice = torch.Generator().manual_seed(2)
        for window in (1, 3, 10):
            for hysteresis in (1, 2, 3):
                ours = LossScale.of(
                    Fp16Config(name="fp16", growth_window=window, hysteresis=hysteresis)
                )
                theirs = DynamicLossScaler(
                    2.0**16, window, 1.0, hysteresis, False, raise_error_at_min_scale=False
                )
                theirs.dtype = torch.float32  # it would ask for its rank to log an overflow
                for _ in range(300):
                    overflow = bool(torch.rand((), generator=dice) < 0.3)
                    ours.update(overflow)
                    quietly(theirs, overflow)
                    assert ours.scale == theirs.cur_scale

    def test_it_stays_above_its_floor(self) -> None:
        scale = LossScale.of(Fp16Config(name="fp16", initial_scale_power=2, minimum_scale=2.0))
        for _ in range(9):
            scale.update(overflow=True)
        assert scale.scale == 2.0


def quietly(scaler: DynamicLossScaler, overflow: bool) -> None:
    import deepspeed.runtime.fp16.loss_scaler as module

    rank, module.dist.get_rank = module.dist.get_rank, lambda: 1
    try:
        scaler.update_scale(overflow)
    finally:
        module.dist.get_rank = rank


WORK = Work(targets=6, tokens=10, rows=2, positions=16, pairs=30)


class TestLedger:
    def ledger(self, **options: Any) -> Ledger:
        return Ledger(lambda values: values, blame=lambda: "It was lm_head. ", **options)

    def stats(self, norm: float, **options: Any) -> StepStats:
        return StepStats(torch.tensor(2.0), torch.tensor(norm), **options)

    def test_skipped_steps_are_recorded_as_such(self) -> None:
        ledger = self.ledger(patience=3)
        ledger.add(1, 0.1, self.stats(math.inf, applied=False, loss_scale=64.0), WORK)
        ledger.add(2, 0.1, self.stats(1.0, loss_scale=32.0), WORK)
        skipped, taken = ledger.flush()
        assert skipped["skipped"] is True
        assert "grad_norm" not in skipped, "infinity is no JSON"
        assert (skipped["loss_scale"], taken["loss_scale"]) == (64.0, 32.0)
        assert "skipped" not in taken

    def test_so_many_in_a_row_end_the_run(self) -> None:
        ledger = self.ledger(patience=3)
        for step in (1, 2, 3):
            ledger.add(step, 0.1, self.stats(math.nan, guarded=True), WORK)
        with pytest.raises(UserError, match=r"step 3: .* the 3th step in a row .* lm_head"):
            ledger.flush()

    def test_one_that_changed_weights_ends_it_at_once(self) -> None:
        ledger = self.ledger(patience=3)
        ledger.add(1, 0.1, self.stats(math.nan), WORK)
        with pytest.raises(UserError, match=r"step 1: .* lm_head"):
            ledger.flush()
