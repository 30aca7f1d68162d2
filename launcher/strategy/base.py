"""The few verbs by which the loop reaches its ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from launcher.config.training import TrainingConfig
from launcher.distributed.process_group import Place
from launcher.distributed.shards import Shard, shard_of
from launcher.loss_scale import LossScale
from launcher.model.load import Weights
from launcher.precision import Precision

# A parameter's name, itself as the optimizer will see it (a shard, perhaps flat), its whole shape.
Trained = tuple[str, nn.Parameter, torch.Size]
# bitsandbytes' names in the state of an 8-bit optimizer: the scale of each block of a moment, and
# the values of the 256 codes, which all parameters share.
BLOCKWISE, CODES, BLOCK = ("absmax1", "absmax2"), ("qmap1", "qmap2"), 256
OptimizerBuilder = Callable[[Iterable[Trained]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    grad_norm: torch.Tensor  # 0-d fp32, where gradients are, before clipping, without loss scale
    applied: bool = True  # False: the gradient overflowed, and no weight was changed
    guarded: bool = False  # a gradient that is not finite changes no weight, though nobody waited
    loss_scale: float | None = None  # that the step was taken with; None: not scaled


@dataclass(frozen=True)
class TrainedState:
    """What training has learnt, as this rank's runs. Writing into a run changes the training."""

    weights: dict[str, Shard]  # parameter name → master weight
    moments: dict[str, dict[str, Shard]]  # exp_avg, exp_avg_sq → parameter name → its run
    counts: dict[str, dict[str, torch.Tensor]]  # parameter name → step, 0-d; as the optimizer's own
    buffers: dict[str, Shard]  # persistent buffers, whole on every rank
    shards: int  # runs that make up one tensor

    @property
    def blockwise(self) -> bool:
        """Whether moments are quantised in blocks of each run: they fit the same runs alone."""
        return any(key in BLOCKWISE for key in self.moments)


class Strategy(Protocol):
    """Owns the model, the optimizer and everything that crosses ranks."""

    model: nn.Module  # call it for a forward
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None  # under fp16

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

    def forget(self) -> None:
        """Drop the gradients since the last step."""

    def step(self, max_norm: float) -> StepResult:
        """Clip the summed gradient to `max_norm`, step the optimizer, clear the gradients. Under
        fp16 an overflow on any rank makes all skip the step."""

    def weights(self) -> dict[str, Shard]:
        """Parameter name → this rank's run of its master weight."""

    def state(self) -> TrainedState:
        """What a checkpoint must hold. The optimizer's moments are made where there are none."""

    def refresh(self) -> None:
        """After the runs of `state()` were written into: working copies follow. Collective."""

    def gather(self, shards: dict[str, Shard]) -> dict[str, torch.Tensor] | None:
        """The tensors of `shards` whole on the CPU of rank 0, None elsewhere, in one message."""

    def on_host(self) -> Iterator[torch.Tensor]:
        """What offloading has in host memory now, where it trains on GPUs."""

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
        gradients = [parameter.grad for parameter in new]  # DeepSpeed's own, under offload
        for parameter in new:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter, gradient in zip(new, gradients, strict=True):
            parameter.grad = gradient
            for key, value in optimizer.state[parameter].items():
                if torch.is_tensor(value) and key not in CODES:
                    value.zero_()
                elif key == "step":
                    optimizer.state[parameter]["step"] = 0
    for parameter in parameters:  # what is restored is written into tensors
        state = optimizer.state[parameter]
        if "step" in state and not torch.is_tensor(state["step"]):
            state["step"] = torch.tensor(float(state["step"]))
    return (optimizer.state[parameter] for parameter in parameters)


def moments_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All tensors that the optimizer keeps."""
    for state in optimizer.state.values():
        yield from (each for each in state.values() if torch.is_tensor(each))


def split_state(
    weights: dict[str, Shard], states: Iterable[dict[str, Any]], shards: int
) -> tuple[dict[str, dict[str, Shard]], dict[str, dict[str, torch.Tensor]]]:
    """(moments, counts) of an optimizer's `states`, one for each of `weights`: what has as many
    elements as the weight's run is a moment of it, a single number is a count. Other shapes are
    those of quantised moments, which are cut as their weight into `shards` runs, and those of
    whole weights (rows and columns)."""
    moments: dict[str, dict[str, Shard]] = {}
    counts: dict[str, dict[str, torch.Tensor]] = {}
    for (name, weight), state in zip(weights.items(), states, strict=True):
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
        for key, value in tensors.items():
            if value.ndim and key not in CODES:
                moments.setdefault(key, {})[name] = _moment(key, value.detach(), weight, shards)
        counts[name] = {key: value for key, value in tensors.items() if value.ndim == 0}
    return moments, counts


def _moment(key: str, value: torch.Tensor, weight: Shard, shards: int) -> Shard:
    if key in BLOCKWISE:
        whole = math.prod(weight.shape)
        run = -(-weight.shape[0] // shards) * math.prod(weight.shape[1:])  # all but the last ones
        blocks = [-(-min(run, whole - at) // BLOCK) for at in range(0, whole, run)]
        begin = sum(blocks[: weight.begin // run])
        return Shard(value.view(-1), begin, (sum(blocks),))
    if value.numel() == weight.local.numel():
        return replace(weight, local=value.view(-1))
    return shard_of(value)


def share_cores(place: Place) -> None:
    """Give a rank whose optimizer steps on the CPU its share of the cores.

    A rank on a GPU is started with one thread; one on CPU has its share already.
    """
    if place.device.type == "cuda" and torch.get_num_threads() == 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total


def persistent_buffers(model: nn.Module) -> dict[str, Shard]:
    """The buffers that belong to a model's weights, by name."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: shard_of(buffer) for name, buffer in model.named_buffers() if name in saved}
