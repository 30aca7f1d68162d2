"""single, ddp, fsdp and hsdp: `fully_shard` (FSDP2) on a replicate × shard mesh.

    single   1 × 1      ddp   N × 1      fsdp   1 × N      hsdp   N/S × S

A shard axis of size 1 shards nothing. The result is data parallelism with fp32 master weights and a
working copy in the compute dtype, by the same code and with the same arithmetic. Under single and
ddp, frozen weights are excluded from `fully_shard`: they need neither a gather nor a second copy.

With `strategy.offload`, this rank's shards stay on the CPU, including gradients, gradient norms and
the optimizer step. A layer is copied to the GPU when it is gathered, also on a single rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from launcher.config.schema.strategy import FsdpConfig, HsdpConfig, StrategyConfig
from launcher.config.schema.training import TrainingConfig
from launcher.distributed.mesh import build_mesh
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import Shard, local_box, local_part, shard_of
from launcher.io.weight_views import read_into
from launcher.model.load import Weights
from launcher.model.text_part import non_text_modules
from launcher.strategy.base import (
    OptimizerBuilder,
    PendingSum,
    StepResult,
    TrainedState,
    persistent_buffers,
    share_cores,
    start_sum_over_ranks,
    sum_over_ranks,
)
from launcher.strategy.fsdp_units import describe_padding, placement_function, shard_units
from launcher.strategy.loss_scale import LossScale
from launcher.strategy.optimizer_state import get_or_create_state, optimizer_tensors, split_state
from launcher.strategy.precision import Precision


class Fsdp:
    """The `Strategy` of single, ddp, fsdp and hsdp."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        config: StrategyConfig,
        training: TrainingConfig,
        rank_info: RankInfo,
        precision: Precision,
    ) -> None:
        self.config = config
        self.rank_info = rank_info
        self.precision = precision
        self.loss_scale = LossScale.from_config(precision.scaling) if precision.scaling else None
        self.mesh = build_mesh(
            rank_info.device.type, rank_info.world_size, shard_size(config, rank_info)
        )
        self._shard_group = self.mesh["shard"].get_group()  # slicing the mesh in a step is slow
        self._is_sharded = self.mesh["shard"].size() > 1
        self._is_offloaded = config.steps_on_cpu
        if self._is_offloaded:
            share_cores(rank_info)

    def setup(
        self, model: nn.Module, weights: Weights | None, build_optimizer: OptimizerBuilder
    ) -> None:
        self.model = model
        self._cast()
        self._shard()
        if weights is not None:
            self._load_weights(weights)
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._defer_sync = self._should_defer_sync()
        # Until the last micro-batch, FSDP2 keeps the sum of a group's gradients, sharded and on the
        # device, where offloading has no room for it.
        self._defers_all_reduce = self.mesh["replicate"].size() > 1 and not self._is_offloaded
        # The optimizer receives this rank's shards as plain parameters that share their storage.
        # With DTensors, the dispatch of list operations takes seconds in the first step (it grows
        # with the square of the list) and milliseconds in every later one.
        self._local_shards = [nn.Parameter(local_part(p.detach())) for p in self._trained.values()]
        self._shares_storage = False
        shapes = [parameter.shape for parameter in self._trained.values()]
        self.optimizer = build_optimizer(
            zip(self._trained, self._local_shards, shapes, strict=True)
        )

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(values)

    def start_sum(self, values: torch.Tensor) -> PendingSum:
        return start_sum_over_ranks(values)

    def set_last_micro_batch(self, last: bool) -> None:
        if self._defer_sync:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif self._defers_all_reduce:
            self.model.set_requires_all_reduce(last)  # type: ignore[operator]

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP2 averages gradients over all ranks; undo it.
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        (loss * (self.rank_info.world_size * scale)).backward()

    def step(self, max_norm: float) -> StepResult:
        self._assign_local_gradients()
        result = self._unscale(self.loss_scale) if self.loss_scale else self._check_gradient()
        if result.applied:
            torch.nn.utils.clip_grads_with_norm_(self._local_shards, max_norm, result.grad_norm)
            self.optimizer.step()
        self.zero_grad()
        return result

    def zero_grad(self) -> None:
        for parameter in (*self._trained.values(), *self._local_shards):
            parameter.grad = None

    def weights(self) -> dict[str, Shard]:
        return {name: shard_of(parameter) for name, parameter in self._trained.items()}

    def state(self) -> TrainedState:
        weights = self.weights()
        states = get_or_create_state(self.optimizer, self._local_shards)
        num_shards = self.mesh["shard"].size()
        moments, step_counts = split_state(weights, states, num_shards)
        buffers = persistent_buffers(self.model)
        return TrainedState(weights, moments, step_counts, buffers, num_shards)

    def sync_working_copies(self) -> None:
        """Drop the working copies of a forward without a backward, which are kept or, if gathered
        ahead for a layer that ran before, still to be used: the next forward gathers new ones."""
        if fully_shard.state(self.model)._is_root is not None:  # type: ignore[attr-defined]
            self.model.reset_iter_state()  # type: ignore[operator]

    def host_tensors(self) -> Iterator[torch.Tensor]:
        if self._is_offloaded:
            yield from map(local_part, self.model.parameters())
            yield from (local_part(p.grad) for p in self._trained.values() if p.grad is not None)
            yield from optimizer_tensors(self.optimizer)

    def describe(self) -> str:
        replicas, shards = self.mesh.shape
        offload = ", kept and stepped in host memory" if self._is_offloaded else ""
        where = f"on {self.rank_info.device.type}{offload}"
        if replicas * shards == 1:
            return f"{self.config.name}: one rank {where}"
        sync = "once a step" if self._defer_sync else "every micro-batch"
        if self._defers_all_reduce and not self._defer_sync:
            sync += ", between replicas once a step"
        parts = f"{replicas} replica{'s' * (replicas > 1)} × {shards} shard{'s' * (shards > 1)}"
        return f"{self.config.name}: {parts} {where}, gradients reduced {sync}"

    def warning(self) -> str | None:
        return describe_padding(self.model.parameters(), self.mesh.shape[1])

    @torch.no_grad()
    def _assign_local_gradients(self) -> None:
        """Give the optimizer this rank's part of every gradient."""
        for shard, parameter in zip(self._local_shards, self._trained.values(), strict=True):
            if not self._shares_storage:  # the first forward pads uneven shards into new storage
                shard.data = local_part(parameter)
            shard.grad = None if parameter.grad is None else local_part(parameter.grad)
        self._shares_storage = True

    def _check_gradient(self) -> StepResult:
        """Make the optimizer skip a step whose gradient is not finite. torch's fused optimizers
        check this on the device. For the others, all ranks wait for the norm."""
        norm = self._gradient_norm()
        if not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return StepResult(norm, applied=bool(norm.isfinite()))
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        return StepResult(norm, skip_if_nonfinite=True)

    def _unscale(self, loss_scale: LossScale) -> StepResult:
        """Divide the gradients by the loss scale. They are reduced already, so an overflow on one
        rank makes the norm infinite on all ranks, which wait for it."""
        scale = loss_scale.scale
        gradients = [shard.grad for shard in self._local_shards if shard.grad is not None]
        torch._foreach_mul_(gradients, 1 / scale)
        norm = self._gradient_norm()
        applied = bool(norm.isfinite())
        loss_scale.update(not applied)
        return StepResult(norm, applied, loss_scale=scale)

    def _gradient_norm(self) -> torch.Tensor:
        """The L2 norm of the full gradient, the same on every rank. The host does not wait."""
        norm = torch.nn.utils.get_total_norm(
            [shard.grad for shard in self._local_shards if shard.grad is not None]
        )
        if not self._is_sharded:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self._shard_group)
        return square.sqrt()

    def _cast(self) -> None:
        """Cast frozen parameters to the compute dtype and trained ones to the master dtype.
        Quantized parameters keep their dtype."""
        for parameter in filter(torch.is_floating_point, self.model.parameters()):
            dtype = self.precision.master if parameter.requires_grad else self.precision.compute
            parameter.data = parameter.data.to(dtype)

    def _shard(self) -> None:
        frozen = {p for p in self.model.parameters() if not p.requires_grad}
        options: dict[str, Any] = {
            "mesh": self.mesh if self.mesh["replicate"].size() > 1 else self.mesh["shard"],
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=self.precision.compute, reduce_dtype=self.precision.reduce
            ),
            "shard_placement_fn": placement_function(self.mesh["shard"].size()),
        }
        frees_layers = self._is_sharded or self._is_offloaded  # after their use
        if self._is_offloaded:
            pin_memory = self.rank_info.device.type == "cuda"
            options |= {"offload_policy": CPUOffloadPolicy(pin_memory=pin_memory)}
        if not frees_layers:
            options |= {"ignored_params": frozen or None}
        # Adapters without their frozen weights are small: one group, one message a step.
        non_text = {p for part in non_text_modules(self.model) for p in part.parameters()}
        if frees_layers or not frozen - non_text:
            frees = isinstance(self.config, FsdpConfig) and self.config.reshard_after_forward
            shard_units(self.model, frees and frees_layers, options)
        # Moves the parameters that it manages, and all buffers, to the device.
        fully_shard(self.model, reshard_after_forward=False, **options)
        for parameter in options.get("ignored_params") or ():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self.rank_info.device)

    def _load_weights(self, weights: Weights) -> None:
        """Read this rank's slice of the stored tensor into every parameter that is on meta."""
        device = torch.device("cpu") if self._is_offloaded else self.rank_info.device
        for slot in weights.slots:
            parameter = slot.parameter
            if not parameter.is_meta:
                continue
            if isinstance(parameter, DTensor):
                shape, offsets = local_box(parameter)
            else:
                shape, offsets = tuple(parameter.shape), (0,) * parameter.ndim
            local = torch.empty(shape, dtype=parameter.dtype, device=device)
            read_into(slot.source, local, offsets)
            loaded = local
            if isinstance(parameter, DTensor):
                # DTensor.from_local would move offloaded shards to the device of the mesh.
                loaded = DTensor(local, parameter._spec, requires_grad=False)
            # In place, so that tied modules and FSDP's own references see the new tensor.
            torch.utils.swap_tensors(
                parameter, nn.Parameter(loaded, requires_grad=parameter.requires_grad)
            )

    def _should_defer_sync(self) -> bool:
        """Whether gradients are reduced only after the last micro-batch of a step.

        This saves communication, but keeps the unsharded gradient until then. That is little memory
        for adapters and four bytes per parameter for full training.
        """
        if not isinstance(self.config, FsdpConfig):
            return True  # nothing is sharded, so the gradient is always complete
        if self.config.gradient_sync == "auto":
            trained = sum(parameter.numel() for parameter in self._trained.values())
            return 10 * trained < sum(parameter.numel() for parameter in self.model.parameters())
        return self.config.gradient_sync == "last"


def shard_size(config: StrategyConfig, rank_info: RankInfo) -> int:
    """The number of ranks that share one copy of the state."""
    if isinstance(config, HsdpConfig):
        return config.shard_size or rank_info.local_world_size
    return rank_info.world_size if isinstance(config, FsdpConfig) else 1
