"""Gradients that overflow, under fp16 and without a loss scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from launcher.data.loader import StepBatch
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import local_part
from launcher.training.metrics import StepStats
from tests.helpers import parts
from tests.helpers.layouts import Layout
from tests.helpers.parts import Case

HUGE = {"initial_scale_power": 30, "growth_window": 4}


def allow_fp16(rank_info: RankInfo) -> None:
    """DeepSpeed reports no fp16 on most CPUs, although torch computes in it there."""
    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float16, torch.bfloat16]


def case_of(tiny: Path, rows: Path, layout: Layout, precision: str, **options: Any) -> Case:
    """With a constant learning rate: these tests run the steps themselves."""
    strategy, _, strategy_options = layout
    return Case(
        tiny, rows, strategy=strategy, strategy_options=strategy_options, precision=precision,
        scheduler="constant", **options,
    )  # fmt: skip


def scales_and_losses(rank_info: RankInfo, case: Case) -> tuple[list[Any], list[float]]:
    """(scale, whether applied) and loss of every step."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    strategy.model.train()
    scales, losses = [], []
    for step in range(case.steps):
        stats = parts.train_step(strategy, loader.step_batch(step))
        scales.append((stats.loss_scale, stats.applied))
        losses.append(strategy.sum(stats.loss).item())
    return scales, losses


def with_factor(strategy: Any, factor: float, step_batch: StepBatch) -> StepStats:
    """One step whose losses are multiplied on this rank."""
    backward = strategy.backward
    strategy.backward = lambda loss: backward(loss * factor)
    try:
        return parts.train_step(strategy, step_batch)
    finally:
        strategy.backward = backward


def with_gradient(strategy: Any, value: float, step_batch: StepBatch) -> StepStats:
    """One step in which an element of a gradient of every rank is `value` after reduction. A
    loss of `value` would not work: if it is infinite, gradients are nan."""
    backward = strategy.backward

    def poison(loss: torch.Tensor) -> None:
        backward(loss)
        for parameter in strategy.model.parameters():
            if parameter.grad is not None:
                local_part(parameter.grad).view(-1)[:1] = value

    strategy.backward = poison
    try:
        return parts.train_step(strategy, step_batch)
    finally:
        strategy.backward = backward


def has_moved(strategy: Any, before: dict[str, torch.Tensor]) -> bool:
    now = strategy.weights()
    return any(not torch.equal(shard.local, before[name]) for name, shard in now.items())


def copies(strategy: Any) -> dict[str, torch.Tensor]:
    return {name: shard.local.clone() for name, shard in strategy.weights().items()}


def overflow_on_one_rank(rank_info: RankInfo, case: Case) -> tuple[bool, list[bool], float]:
    """Only rank 1 has an infinite gradient in step 1. Return whether weights changed in it, whether
    each step was applied, and the final scale."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy = train_state.strategy
    before = copies(strategy)
    first = with_factor(strategy, math.inf if rank_info.rank == 1 else 1.0, loader.step_batch(0))
    moved = has_moved(strategy, before)
    second = parts.train_step(strategy, loader.step_batch(1))
    assert strategy.loss_scale is not None
    return moved, [first.applied, second.applied], strategy.loss_scale.scale
