"""The few verbs by which the loop reaches its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from launcher.distributed.process_group import Place
from launcher.model.load import Weights
from launcher.precision import Precision

OptimizerBuilder = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    grad_norm: torch.Tensor  # 0-d fp32, on the device, before clipping


class Strategy(Protocol):
    """Owns the model, the optimizer and everything that crosses ranks."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, config: Any, place: Place, precision: Precision) -> None: ...

    def setup(
        self, model: nn.Module, weights: Weights | None, build_optimizer: OptimizerBuilder
    ) -> None:
        """Shard `model`, fill it from `weights`, cast it, then build the optimizer over the shards.

        Without `weights` the model is real already, and the same on every rank.
        """

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over the ranks; a CPU tensor is summed without waiting for the GPU."""

    def accumulate(self, last: bool) -> None:
        """Before each micro-batch: whether it is the last one of the step."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`. Over all ranks and micro-batches gradients are summed, not
        averaged: the caller divides by the global count of target tokens."""

    def step(self, max_norm: float) -> StepResult:
        """Clip the summed gradient to `max_norm`, step the optimizer, clear the gradients."""

    def gather_trained(self) -> dict[str, torch.Tensor] | None:
        """The trained parameters whole on the CPU of rank 0, None elsewhere. Collective."""

    def save_model(self, folder: Path) -> None:
        """Write the model's shards into `folder`, one process its own. Collective."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def describe(self) -> str:
        """The layout in words, for the start of the log."""
