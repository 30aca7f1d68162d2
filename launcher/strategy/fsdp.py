"""single, ddp, fsdp and hsdp: `fully_shard` (FSDP2) on a replicate × shard mesh.

    single   1 × 1      ddp   N × 1      fsdp   1 × N      hsdp   N/S × S

A mesh with a shard axis of size 1 shards nothing: it is data parallelism with fp32 masters and a
compute copy, in the same code and the same arithmetic. Under single and ddp frozen weights are left
out of `fully_shard`: they need neither a gather nor a second copy.

With `strategy.offload` what this rank keeps is on the CPU, gradients, norms and the optimizer's
step included; a layer is copied to the GPU where it is gathered, on one rank as on several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from launcher.config.strategy import FsdpConfig, HsdpConfig, StrategyConfig
from launcher.config.training import TrainingConfig
from launcher.distributed.mesh import build_mesh
from launcher.distributed.process_group import Place
from launcher.distributed.shards import Shard, gather_to_main, local_box, local_part, shard_of
from launcher.loss_scale import LossScale
from launcher.model.layers import decoder_layers
from launcher.model.load import Weights
from launcher.precision import Precision
from launcher.strategy.base import (
    OptimizerBuilder,
    StepResult,
    TrainedState,
    moments_of,
    optimizer_state,
    persistent_buffers,
    share_cores,
    split_state,
    sum_over_ranks,
)


class Fsdp:
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self, config: StrategyConfig, training: TrainingConfig, place: Place, precision: Precision
    ) -> None:
        self.config = config
        self.place = place
        self.precision = precision
        self.loss_scale = LossScale.of(precision.scaling) if precision.scaling else None
        self.mesh = build_mesh(place.device.type, place.world_size, shard_size(config, place))
        self._shard_group = self.mesh["shard"].get_group()  # slicing a mesh in a step costs a wait
        self._shards = self.mesh["shard"].size() > 1
        self._offloads = config.steps_on_cpu
        if self._offloads:
            share_cores(place)

    def setup(
        self, model: nn.Module, weights: Weights | None, build_optimizer: OptimizerBuilder
    ) -> None:
        self.model = model
        self._cast()
        self._shard()
        if weights is not None:
            self._fill(weights)
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._defer_sync = self._defers_sync()
        # The optimizer sees this rank's shards as plain parameters that share their storage:
        # DTensor's dispatch of list operations costs seconds in the first step (it grows with the
        # square of the list) and milliseconds in each.
        self._shards_trained = [
            nn.Parameter(local_part(p.detach())) for p in self._trained.values()
        ]
        self._bound = False
        shapes = [parameter.shape for parameter in self._trained.values()]
        named = zip(self._trained, self._shards_trained, shapes, strict=True)
        self.optimizer = build_optimizer(named)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(values)

    def accumulate(self, last: bool) -> None:
        if self._defer_sync:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP2 averages gradients over all ranks; undo it.
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        (loss * (self.place.world_size * scale)).backward()

    def step(self, max_norm: float) -> StepResult:
        self._lend_gradients()
        result = self._unscale(self.loss_scale) if self.loss_scale else self._guarded()
        if result.applied:
            torch.nn.utils.clip_grads_with_norm_(self._shards_trained, max_norm, result.grad_norm)
            self.optimizer.step()
        self.forget()
        return result

    def forget(self) -> None:
        for parameter in (*self._trained.values(), *self._shards_trained):
            parameter.grad = None

    def weights(self) -> dict[str, Shard]:
        return {name: shard_of(parameter) for name, parameter in self._trained.items()}

    def state(self) -> TrainedState:
        weights = self.weights()
        states = optimizer_state(self.optimizer, self._shards_trained)
        shards = self.mesh["shard"].size()
        moments, counts = split_state(weights, states, shards)
        return TrainedState(weights, moments, counts, persistent_buffers(self.model), shards)

    def refresh(self) -> None:
        """Nothing to do: FSDP2 makes the working copies anew at every gather."""

    def gather(self, shards: dict[str, Shard]) -> dict[str, torch.Tensor] | None:
        return gather_to_main(shards, self._shard_group)

    def on_host(self) -> Iterator[torch.Tensor]:
        if self._offloads:
            yield from map(local_part, self.model.parameters())
            yield from (local_part(p.grad) for p in self._trained.values() if p.grad is not None)
            yield from moments_of(self.optimizer)

    def describe(self) -> str:
        replicas, shards = self.mesh.shape
        sync = "once a step" if self._defer_sync else "every micro-batch"
        kept = ", kept and stepped in host memory" if self._offloads else ""
        return (
            f"{self.config.name}: {replicas} replica(s) × {shards} shard(s) on "
            f"{self.place.device.type}{kept}, gradients reduced {sync}"
        )

    @torch.no_grad()
    def _lend_gradients(self) -> None:
        """Show the optimizer this rank's part of every gradient."""
        for shard, parameter in zip(self._shards_trained, self._trained.values(), strict=True):
            if not self._bound:  # FSDP pads uneven shards in the first forward: new storage
                shard.data = local_part(parameter)
            shard.grad = None if parameter.grad is None else local_part(parameter.grad)
        self._bound = True

    def _guarded(self) -> StepResult:
        """Have the optimizer skip a step whose gradient is not finite. torch's own need not wait to
        know whether it is; others are not asked to step, which all ranks wait for."""
        norm = self._gradient_norm()
        if not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return StepResult(norm, applied=bool(norm.isfinite()))
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        return StepResult(norm, guarded=True)

    def _unscale(self, loss_scale: LossScale) -> StepResult:
        """Take the loss scale out of the gradients. They are reduced, so that what overflowed on
        one rank is infinite in the norm of all; all ranks wait for that norm."""
        scale = loss_scale.scale
        gradients = [shard.grad for shard in self._shards_trained if shard.grad is not None]
        torch._foreach_mul_(gradients, 1 / scale)
        norm = self._gradient_norm()
        applied = bool(norm.isfinite())
        loss_scale.update(not applied)
        return StepResult(norm, applied, loss_scale=scale)

    def _gradient_norm(self) -> torch.Tensor:
        """The L2 norm of the whole gradient, the same on every rank. Nobody waits for it."""
        norm = torch.nn.utils.get_total_norm(
            [shard.grad for shard in self._shards_trained if shard.grad is not None]
        )
        if not self._shards:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self._shard_group)
        return square.sqrt()

    def _cast(self) -> None:
        """Frozen parameters to the compute dtype, trained ones to the master dtype; quantised ones
        stay as they are."""
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
        }
        frees = self._shards or self._offloads  # layers, after their use
        if self._offloads:
            pinned = self.place.device.type == "cuda"
            options |= {"offload_policy": CPUOffloadPolicy(pin_memory=pinned)}
        if not frees:
            options |= {"reshard_after_forward": False, "ignored_params": frozen or None}
        elif isinstance(self.config, FsdpConfig):
            options |= {"reshard_after_forward": self.config.reshard_after_forward}
        # Adapters without their frozen weights are small: one group, one message a step.
        if frees or not frozen:
            for layer in decoder_layers(self.model):
                fully_shard(layer, **options)
        fully_shard(self.model, **options)  # moves what it manages, and all buffers, to the device
        for parameter in options.get("ignored_params") or ():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self.place.device)

    def _fill(self, weights: Weights) -> None:
        """Give every parameter that is still on meta this rank's slice of the stored tensor."""
        device = torch.device("cpu") if self._offloads else self.place.device
        for slot in weights.slots:
            parameter = slot.parameter
            if not parameter.is_meta:
                continue
            if isinstance(parameter, DTensor):
                shape, offsets = local_box(parameter)
            else:
                shape, offsets = tuple(parameter.shape), (0,) * parameter.ndim
            local = slot.stored.read(offsets, shape)
            # A copy in any case: what the reader gives may be the mapped file.
            local = local.to(device, parameter.dtype, copy=True)
            filled = local
            if isinstance(parameter, DTensor):
                # Not from_local, which moves to the mesh's device what is offloaded.
                filled = DTensor(local, parameter._spec, requires_grad=False)
            # In place, so that tied modules and FSDP's own references see it.
            torch.utils.swap_tensors(
                parameter, nn.Parameter(filled, requires_grad=parameter.requires_grad)
            )

    def _defers_sync(self) -> bool:
        """Whether whole gradients may wait for the last micro-batch of a step.

        Deferring saves traffic and holds the unsharded gradient meanwhile: nothing for adapters,
        four bytes a parameter for full training.
        """
        if not isinstance(self.config, FsdpConfig):
            return True  # nothing is sharded: the gradient is whole anyway
        if self.config.gradient_sync == "auto":
            trained = sum(parameter.numel() for parameter in self._trained.values())
            return 10 * trained < sum(parameter.numel() for parameter in self.model.parameters())
        return self.config.gradient_sync == "last"


def shard_size(config: StrategyConfig, place: Place) -> int:
    """Ranks that share one copy of the state."""
    if isinstance(config, HsdpConfig):
        return config.shard_size or place.local_world_size
    return place.world_size if isinstance(config, FsdpConfig) else 1
