"""The interface between the training loop and the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from launcher.config.schema.strategy import StrategyConfig
from launcher.config.schema.training import TrainingConfig
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import Shard, shard_of
from launcher.io.cpus import usable_cpus
from launcher.model.load import Weights
from launcher.strategy.loss_scale import LossScale
from launcher.strategy.optimizer_state import BLOCK_SCALES
from launcher.strategy.precision import Precision

# The name of a trained parameter, the parameter as the optimizer sees it (a shard, possibly
# flattened), and the shape of the full tensor.
TrainedParameter = tuple[str, nn.Parameter, torch.Size]
OptimizerBuilder = Callable[[Iterable[TrainedParameter]], torch.optim.Optimizer]
PendingSum = Callable[[], torch.Tensor]  # waits for a sum over ranks and returns it


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step."""

    # 0-d fp32, on the device of the gradients or on the CPU: before clipping and without the loss
    # scale.
    grad_norm: torch.Tensor
    applied: bool = True  # False: the gradient was not finite, and no weight has changed
    # The optimizer skips the step on the device if the gradient is not finite; `applied` is then
    # True in any case, because the host does not wait for the answer.
    skip_if_nonfinite: bool = False
    loss_scale: float | None = None  # the scale of this step; None: the loss was not scaled


@dataclass(frozen=True)
class TrainedState:
    """The trained weights and the optimizer state, as shards of this rank.

    The shards share memory with the training: writing to them changes the run.
    """

    weights: dict[str, Shard]  # parameter name → shard of the master weight
    moments: dict[str, dict[str, Shard]]  # exp_avg, exp_avg_sq, … → parameter name → shard
    step_counts: dict[str, dict[str, torch.Tensor]]  # parameter name → 0-d tensors, by their key
    buffers: dict[str, Shard]  # persistent buffers, complete on every rank
    num_shards: int  # into which a tensor is split

    @property
    def has_blockwise_moments(self) -> bool:
        """Whether moments are quantized in blocks of each shard. Such moments can only be restored
        with the same number of shards."""
        return any(key in BLOCK_SCALES for key in self.moments)


class Strategy(Protocol):
    """Owns the model, the optimizer and all communication between ranks."""

    model: nn.Module  # to call for a forward pass
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None  # with fp16
    rank_info: RankInfo

    def __init__(
        self,
        config: StrategyConfig,
        training: TrainingConfig,
        rank_info: RankInfo,
        precision: Precision,
    ) -> None: ...

    def setup(
        self, model: nn.Module, weights: Weights | None, build_optimizer: OptimizerBuilder
    ) -> None:
        """Shard `model`, load it from `weights`, cast it, and build the optimizer over the shards.

        Without `weights` the model has its values already, the same ones on every rank.
        """

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over the ranks. Summing a CPU tensor does not wait for the GPU."""

    def start_sum(self, values: torch.Tensor) -> PendingSum:
        """Start to sum a CPU tensor over the ranks, while the caller computes. Collective."""

    def set_last_micro_batch(self, last: bool) -> None:
        """Call this before each micro-batch: `last` is True for the last one of the step."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`. Gradients are summed over all ranks and micro-batches,
        not averaged: the caller divides by the global number of target tokens."""

    def zero_grad(self) -> None:
        """Discard the gradients accumulated since the last step."""

    def step(self, max_norm: float) -> StepResult:
        """Clip the gradient to `max_norm`, step the optimizer and clear the gradients. With fp16,
        all ranks skip the step if the gradient overflows on any of them."""

    def weights(self) -> dict[str, Shard]:
        """Parameter name → this rank's shard of the master weight."""

    def state(self) -> TrainedState:
        """The state that a checkpoint saves. Creates moments that do not exist yet."""

    def sync_working_copies(self) -> None:
        """Update the working copies after the shards of `state()` were written to. Collective."""

    def host_tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that offloading keeps in host memory now, when training runs on GPUs."""

    def describe(self) -> str:
        """The layout as text, for the start of the log."""

    def warning(self) -> str | None:
        """What this layout wastes for this model, and the way out; None if it is not much."""


def share_cores(rank_info: RankInfo) -> None:
    """Give a rank whose optimizer runs on the CPU its share of the cores.

    Ranks on GPUs are started with one thread; ranks on the CPU have their share already.
    """
    if rank_info.device.type == "cuda" and torch.get_num_threads() == 1:
        torch.set_num_threads(max(1, usable_cpus() // rank_info.local_world_size))


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all ranks, as a new tensor. Collective."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def start_sum_over_ranks(values: torch.Tensor) -> PendingSum:
    """Start `sum_over_ranks`; the result waits for it. Collective."""
    total = values.clone()
    work = dist.all_reduce(total, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return total

    return wait


def persistent_buffers(model: nn.Module) -> dict[str, Shard]:
    """The buffers in the state dict of `model`, by name."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: shard_of(buffer) for name, buffer in model.named_buffers() if name in saved}
