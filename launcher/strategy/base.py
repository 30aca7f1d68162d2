"""The few verbs by which the loop reaches its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from launcher.config.training import TrainingConfig
from launcher.distributed.process_group import Place
from launcher.distributed.shards import Shard, shard_of
from launcher.model.load import Weights
from launcher.precision import Precision

# A parameter as the optimizer will see it (a shard, perhaps flat), and its whole shape.
Trained = tuple[nn.Parameter, torch.Size]
OptimizerBuilder = Callable[[Iterable[Trained]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    grad_norm: torch.Tensor  # 0-d fp32, on the device, before clipping


@dataclass(frozen=True)
class TrainedState:
    """What training has learnt, as this rank's runs. Writing into a run changes the training."""

    weights: dict[str, Shard]  # parameter name → master weight
    moments: dict[str, dict[str, Shard]]  # exp_avg, exp_avg_sq → parameter name → its run
    counts: dict[str, dict[str, torch.Tensor]]  # parameter name → step, 0-d; as the optimizer's own
    buffers: dict[str, Shard]  # persistent buffers, whole on every rank


class Strategy(Protocol):
    """Owns the model, the optimizer and everything that crosses ranks."""

    model: nn.Module  # call it for a forward
    optimizer: torch.optim.Optimizer

    def __init__(
        self, config: Any, training: TrainingConfig, place: Place, precision: Precision
    ) -> None: ...

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

    def weights(self) -> dict[str, Shard]:
        """Parameter name → this rank's run of its master weight."""

    def state(self) -> TrainedState:
        """What a checkpoint must hold. The optimizer's moments are made where there are none."""

    def refresh(self) -> None:
        """After the runs of `state()` were written into: working copies follow. Collective."""

    def gather(self, shards: dict[str, Shard]) -> dict[str, torch.Tensor] | None:
        """The tensors of `shards` whole on the CPU of rank 0, None elsewhere, in one message."""

    def describe(self) -> str:
        """The layout in words, for the start of the log."""


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> Iterator[dict[str, Any]]:
    """The optimizer's state of each parameter; where it has none yet, it is made and left as new.

    A step with gradients of zero at a learning rate of zero changes no weight: the way of
    torch.distributed.checkpoint.state_dict.
    """
    parameters = list(parameters)
    new = [parameter for parameter in parameters if not optimizer.state.get(parameter)]
    if new:
        rates = [group["lr"] for group in optimizer.param_groups]
        for parameter in new:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter in new:
            parameter.grad = None
            for value in optimizer.state[parameter].values():
                if torch.is_tensor(value):
                    value.zero_()
    return (optimizer.state[parameter] for parameter in parameters)


def split_state(
    weights: dict[str, Shard], states: Iterable[dict[str, Any]]
) -> tuple[dict[str, dict[str, Shard]], dict[str, dict[str, torch.Tensor]]]:
    """(moments, counts) of an optimizer's `states`, one for each of `weights`: what has as many
    elements as the weight's run is a moment of it, a single number is a count."""
    moments: dict[str, dict[str, Shard]] = {}
    counts: dict[str, dict[str, torch.Tensor]] = {}
    for (name, weight), state in zip(weights.items(), states, strict=True):
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
        for key, value in tensors.items():
            if value.ndim and value.numel() == weight.local.numel():
                moment = replace(weight, local=value.detach().view(-1))
                moments.setdefault(key, {})[name] = moment
        counts[name] = {key: value for key, value in tensors.items() if value.ndim == 0}
    return moments, counts


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total


def persistent_buffers(model: nn.Module) -> dict[str, Shard]:
    """The buffers that belong to a model's weights, by name."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: shard_of(buffer) for name, buffer in model.named_buffers() if name in saved}
