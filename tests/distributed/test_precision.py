"""The loss scale is equal under every strategy, and overflowing gradients change no weight."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from safetensors.torch import load_file, save_file

from launcher.config.schema.precision import Fp16Config
from launcher.distributed.gather import gather_to_main
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.strategy.loss_scale import LossScale
from launcher.training.metrics import MetricsBuffer, StepStats
from launcher.training.nonfinite import first_bad_module
from launcher.training.throughput import Work
from tests.helpers import parts
from tests.helpers.checkpoints import END, STOP, run_steps
from tests.helpers.layouts import ONE_OF_EACH
from tests.helpers.parts import Case
from tests.helpers.precision import (
    HUGE,
    allow_fp16,
    case_of,
    copies,
    has_moved,
    overflow_on_one_rank,
    scales_and_losses,
    with_factor,
    with_gradient,
)

# The mean over ranks scales a gradient too: with equal ranks, the same gradients overflow.
AT_TWO = [
    *((name, 2, {}) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
    ("hsdp", 2, {"shard_size": 2}),
]


@pytest.fixture(autouse=True)
def fp16(ranks: Any) -> None:
    ranks.run(4, allow_fp16)


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
def test_a_growing_scale_does_not_change_any_step(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, world: int
) -> None:
    """It grows by powers of two, which scale exactly. DeepSpeed's own grows before it unscales."""
    found = []
    for window in (1, 1000):
        options = {"initial_scale_power": 6, "growth_window": window}
        case = case_of(
            tiny, rows_file, (strategy, world, {}), "fp16", precision_options=options, steps=8
        )
        found.append(ranks.run(world, scales_and_losses, case)[0])
    (growing, losses), (steady, expected) = found
    assert growing[-1] == (2.0**12, True)
    assert steady[-1] == (2.0**6, True)
    assert losses == pytest.approx(expected, rel=1e-5)


def steps_of(rank_info: RankInfo, case: Case) -> list[dict[str, Any]]:
    """What the loop records for each step."""
    train_state, loader = parts.set_up(rank_info, case)
    recorder = parts.Recorder()
    parts.fit(train_state, loader, parts.plan(case.steps), recorder)
    return recorder.steps


def test_a_skipped_step_does_not_change_the_learning_rate(
    ranks: Any, tiny: Path, rows_file: Path
) -> None:
    case = Case(
        tiny, rows_file, strategy="single", precision="fp16", steps=18,
        precision_options={"initial_scale_power": 30, "hysteresis": 1},
    )  # fmt: skip
    (steps,) = ranks.run(1, steps_of, case)
    skipped = ["skipped" in step for step in steps]
    assert skipped[0]
    assert skipped.count(False) >= 4, "the warm-up has three steps"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=case.learning_rate)
    schedule = case.build_scheduler(optimizer)
    for step, was_skipped in zip(steps, skipped, strict=True):
        assert step["learning_rate"] == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
        if not was_skipped:
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("layout", ONE_OF_EACH[1:], ids=lambda layout: layout[0])
def test_an_overflow_on_one_rank_makes_all_skip_the_step(
    ranks: Any, tiny: Path, rows_file: Path, layout: Any
) -> None:
    options = {"initial_scale_power": 8, "hysteresis": 1}
    case = case_of(tiny, rows_file, layout, "fp16", precision_options=options)
    for answer in ranks.run(layout[1], overflow_on_one_rank, case):
        assert answer == (False, [False, True], 2.0**7)


@pytest.mark.parametrize("layout", [("fsdp", 3, {}), ("zero3", 3, {})], ids=lambda each: each[0])
def test_the_scale_resumes_with_its_history(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, layout: Any
) -> None:
    options = {"initial_scale_power": 20, "growth_window": 2}
    case = case_of(
        tiny, rows_file, layout, "fp16", precision_options=options, steps=END, method="full"
    )
    world = layout[1]
    whole = ranks.run(world, run_steps, case, tmp_path / "whole", 0, END)
    first = ranks.run(world, run_steps, case, tmp_path / "parts", 0, STOP)
    second = ranks.run(world, run_steps, case, tmp_path / "parts", STOP, END)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def poisoned(rank_info: RankInfo, case: Case) -> tuple[list[bool], bool, str]:
    """Steps with a gradient that is nan or infinite: whether weights changed in each, and in the
    next step; the reported cause when a weight is not finite."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    before = copies(strategy)
    moved = []
    for value in (math.nan, math.inf, -math.inf):
        stats = with_gradient(strategy, value, loader.step_batch(0))
        assert not stats.grad_norm.isfinite()
        assert stats.skip_if_nonfinite or not stats.applied
        moved.append(has_moved(strategy, before))
    with_factor(strategy, 1.0, loader.step_batch(1))
    moves_on = has_moved(strategy, before)
    with torch.no_grad():
        for name, shard in strategy.weights().items():
            if "layers.1.mlp.up_proj" in name:
                shard.local.fill_(math.nan)
    return moved, moves_on, first_bad_module(strategy.model, loader.step_batch(0), rank_info.device)


# An optimizer that skips the step on the device, one that does not, and a loss scale.
@pytest.mark.parametrize(
    ("precision", "optimizer", "layout"),
    [
        *(("fp32", "adamw", layout) for layout in ONE_OF_EACH[:4]),
        *(("bf16", "lion", layout) for layout in ONE_OF_EACH[:4]),
        ("fp16", "adamw", ONE_OF_EACH[2]),
    ],
)
def test_a_gradient_that_is_nan_or_infinite_changes_no_weight(
    ranks: Any, tiny: Path, rows_file: Path, layout: Any, precision: str, optimizer: str
) -> None:
    scale = {"precision_options": {"initial_scale_power": 8}} if precision == "fp16" else {}
    case = case_of(tiny, rows_file, layout, precision, method="full", optimizer=optimizer, **scale)
    for moved, moves_on, diagnose in ranks.run(layout[1], poisoned, case):
        assert (moved, moves_on) == ([False, False, False], True)
        assert "model.layers.1.mlp.up_proj." in diagnose


@pytest.fixture(scope="module")
def stored_in_fp32(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights that bf16 cannot represent."""
    folder = tmp_path_factory.mktemp("models") / "fp32"
    shutil.copytree(tiny, folder)
    dice = torch.Generator().manual_seed(4)
    stored = load_file(folder / "model.safetensors")
    finer = {n: t.float() + 1e-4 * torch.rand(t.shape, generator=dice) for n, t in stored.items()}
    save_file(finer, folder / "model.safetensors", {"format": "pt"})
    return folder


def masters(rank_info: RankInfo, case: Case) -> dict[str, torch.Tensor] | None:
    """The full weights that a run starts with, on rank 0."""
    strategy = parts.set_up(rank_info, case)[0].strategy
    return gather_to_main(strategy.weights())


@pytest.mark.parametrize("layout", [("fsdp", 2, {}), ("zero2", 2, {}), ("zero3", 2, {})])
def test_master_weights_start_at_the_stored_weights_and_not_at_rounded_ones(
    ranks: Any, stored_in_fp32: Path, rows_file: Path, layout: Any
) -> None:
    case = case_of(stored_in_fp32, rows_file, layout, "bf16", method="full")
    found = ranks.run(2, masters, case)[0]
    stored = load_file(stored_in_fp32 / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, weight in stored.items():
        assert torch.equal(found[name], weight), name
        assert not torch.equal(weight, weight.bfloat16().float())


class TestLossScale:
    def test_scale_equals_that_of_deepspeed(self) -> None:
        """Over 300 steps, some of which overflow, for every window and hysteresis."""
        dice = torch.Generator().manual_seed(2)
        for window in (1, 3, 10):
            for hysteresis in (1, 2, 3):
                ours = LossScale.from_config(
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

    def test_scale_stays_above_its_minimum(self) -> None:
        scale = LossScale.from_config(
            Fp16Config(name="fp16", initial_scale_power=2, minimum_scale=2.0)
        )
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


class TestMetricsBuffer:
    def buffer(self, **options: Any) -> MetricsBuffer:
        return MetricsBuffer(lambda values: values, diagnose=lambda: "It was lm_head. ", **options)

    def stats(self, norm: float, **options: Any) -> StepStats:
        return StepStats(torch.tensor(2.0), torch.tensor(norm), **options)

    def test_skipped_steps_are_recorded_as_such(self) -> None:
        buffer = self.buffer(max_nonfinite_steps=3)
        buffer.add(1, 0.1, self.stats(math.inf, applied=False, loss_scale=64.0), WORK)
        buffer.add(2, 0.1, self.stats(1.0, loss_scale=32.0), WORK)
        skipped, taken = buffer.flush()
        assert skipped["skipped"] is True
        assert "grad_norm" not in skipped, "infinity is no JSON"
        assert (skipped["loss_scale"], taken["loss_scale"]) == (64.0, 32.0)
        assert "skipped" not in taken

    def test_too_many_skipped_steps_in_a_row_end_the_run(self) -> None:
        buffer = self.buffer(max_nonfinite_steps=3)
        for step in (1, 2, 3):
            buffer.add(step, 0.1, self.stats(math.nan, skip_if_nonfinite=True), WORK)
        with pytest.raises(UserError, match=r"step 3: .* for 3 steps in a row.* lm_head"):
            buffer.flush()

    def test_an_overflow_that_changed_weights_ends_the_run_immediately(self) -> None:
        buffer = self.buffer(max_nonfinite_steps=3)
        buffer.add(1, 0.1, self.stats(math.nan), WORK)
        with pytest.raises(UserError, match=r"step 1: .* lm_head"):
            buffer.flush()
