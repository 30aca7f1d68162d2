"""zero1, zero2 and zero3: DeepSpeed's engine behind the `Strategy` interface.

The engine's JSON comes from `launcher.config.deepspeed`. This module does seven things itself,
because DeepSpeed would do them wrong without an error, or with the full model on every rank:

* Under zero3 each rank reads its own partition of every parameter from the files, and the model is
  built the same way as under other strategies. Building it inside `zero.Init` would initialize
  loaded embeddings again, round rotary frequencies and break adapters.
* Under zero3 gathered weights are not kept from forward to backward
  (`launcher.strategy.zero3_saved_tensors`).
* Under zero3 small parameters are gathered together (`launcher.strategy.zero3_small_parameters`).
* Master weights start at the stored value, not at the value rounded to the working dtype.
* After master weights are restored from a checkpoint, the working copies are updated from them.
* A parameter that got no gradient in a step is not stepped with the gradient of an earlier one.
* Under offload, a gradient that overflowed is not added to the gradient of the next step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from launcher.config.deepspeed import engine_config
from launcher.config.schema.precision import PrecisionConfig
from launcher.config.schema.strategy import Zero3Config, ZeroConfig
from launcher.config.schema.training import TrainingConfig
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import Shard
from launcher.errors import UserError
from launcher.io.weight_views import read_flat_range
from launcher.model.load import Weights
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
from launcher.strategy.loss_scale import LossScale
from launcher.strategy.optimizer_state import get_or_create_state, optimizer_tensors, split_state
from launcher.strategy.precision import Precision
from launcher.strategy.zero3_small_parameters import SmallParameters
from launcher.strategy.zero_loading import (
    FlatRange,
    check_nvme_buffer_size,
    load_weights,
    partition_of,
)

# Without GPUs gloo does all communication. DeepSpeed would compile its own all-reduce on the first
# start. If that start is killed while compiling, it leaves a lock on which all later starts wait.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Section of the engine's JSON → what it offloads.
OFFLOADED = {"offload_optimizer": "masters and moments", "offload_param": "parameters"}


class DeepSpeed:
    """The `Strategy` of zero1, zero2 and zero3."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        config: ZeroConfig,
        training: TrainingConfig,
        rank_info: RankInfo,
        precision: Precision,
    ) -> None:
        """Raises UserError for fp16 on a device where DeepSpeed does not support it."""
        self.config = config
        self.rank_info = rank_info
        self.precision = precision
        self.loss_scale = LossScale.from_config(precision.scaling) if precision.scaling else None
        if self.loss_scale and not get_accelerator().is_fp16_supported():
            raise UserError(
                f"precision=fp16 with strategy={config.name}: DeepSpeed does not support fp16 on "
                f"{rank_info.device.type}; choose precision=bf16, or strategy=fsdp"
            )
        if config.steps_on_cpu:
            share_cores(rank_info)
        arithmetic = precision.scaling or PrecisionConfig(name=precision.name)
        self.engine_config = engine_config(config, training, arithmetic, rank_info.world_size)

    def setup(
        self, model: nn.Module, weights: Weights | None, build_optimizer: OptimizerBuilder
    ) -> None:
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._shapes = {name: parameter.shape for name, parameter in self._trained.items()}
        slots = weights.by_parameter() if weights else {}
        sources = {key: slot.source for key, slot in slots.items()}
        # The working dtype cannot represent the initial values of adapters exactly.
        exact = {n: p.detach().clone() for n, p in self._trained.items() if not p.is_meta}
        deepspeed.init_distributed()  # uses the existing process group
        if isinstance(self.config, Zero3Config):
            check_nvme_buffer_size(self.config, model, self.rank_info)
        zero3 = self.engine_config if self.config.stage == 3 else None
        load_weights(model, sources, self.rank_info, self.precision.compute, zero3)
        self.optimizer = build_optimizer(
            (name, parameter, self._shapes[name]) for name, parameter in self._trained.items()
        )
        self._group_of = {
            id(parameter): index
            for index, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
        }
        self._unwrapped_model = model
        self.model, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=self.engine_config,
            dist_init_required=False,
        )
        self._small: SmallParameters | None = None
        if self.config.stage == 3:
            self._small = SmallParameters(self._zero, self.config.reduce_bucket_size)
        if self.loss_scale:
            # `self.loss_scale` decides, after the step: if DeepSpeed increased the scale during the
            # step, it would also unscale the gradients of that step by the new value.
            self._zero.loss_scaler.update_scale = lambda has_overflow: None
        for name, shard in self.weights().items():
            if name in exact:
                shard.local.copy_(shard.slice_of(exact[name]))
                continue
            source = sources[id(self._trained[name])]
            if source.dtype.itemsize > self.precision.compute.itemsize:
                shard.local.copy_(read_flat_range(source, shard.begin, shard.local.numel()))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(values)

    def start_sum(self, values: torch.Tensor) -> PendingSum:
        return start_sum_over_ranks(values)

    def set_last_micro_batch(self, last: bool) -> None:
        """Nothing to do: `step` ends the accumulation after any number of micro-batches."""

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages gradients over all ranks; undo it.
        self.model.backward(loss * self.rank_info.world_size, scale_wrt_gas=False)  # type: ignore[operator]

    def zero_grad(self) -> None:
        raise RuntimeError("DeepSpeed keeps gradients in its own buffers")

    def step(self, max_norm: float) -> StepResult:
        self._clear_stale_gradients()
        self._zero.clip_grad = max_norm
        scale = self.loss_scale.scale if self.loss_scale else None
        self.model.step()  # type: ignore[operator]
        if self._small is not None:
            self._small.gather()
        applied = not getattr(self._zero, "overflow", False)
        norm = self.model.get_global_grad_norm() if applied else math.inf  # type: ignore[operator]
        if self.config.steps_on_cpu and not applied:
            self._zero.averaged_gradients.clear()
        if self.loss_scale:
            self.loss_scale.update(not applied)
            self._zero.loss_scaler.cur_scale = self.loss_scale.scale
        # Not moved to another device: the host would wait for the copy.
        return StepResult(torch.as_tensor(norm).float(), applied, loss_scale=scale)

    def weights(self) -> dict[str, Shard]:
        shards = {}
        for name, parameter in self._trained.items():
            part = self._flat_range(parameter)
            local = self._flat_masters[part.buffer].detach()[part.in_buffer]
            shards[name] = Shard(local, part.start, tuple(self._shapes[name]))
        return shards

    def state(self) -> TrainedState:
        buffer_states = self._buffer_states()
        weights, states = self.weights(), []
        for parameter in self._trained.values():
            part = self._flat_range(parameter)
            states.append(
                {
                    key: value[part.in_buffer] if torch.is_tensor(value) and value.ndim else value
                    for key, value in buffer_states[part.buffer].items()
                }
            )
        num_shards = self.rank_info.world_size
        moments, step_counts = split_state(weights, states, num_shards)
        buffers = persistent_buffers(self._unwrapped_model)
        return TrainedState(weights, moments, step_counts, buffers, num_shards)

    def sync_working_copies(self) -> None:
        if self.loss_scale:
            self._zero.loss_scaler.cur_scale = self.loss_scale.scale
        if self._small is None:
            self._zero.update_lp_params()
            return
        working_copies = self._zero.fp16_partitioned_groups_flat
        pairs = zip(self._flat_masters, working_copies, strict=True)
        for index, (master, working_copy) in enumerate(pairs):
            if working_copy is None:  # on disk
                self._zero._partitioned_params_swap_out(index)
            else:
                working_copy.copy_(master.detach())
        self._small.gather_again()

    def host_tensors(self) -> Iterator[torch.Tensor]:
        if self.config.parameters_on_cpu:
            partitioned: list[Any] = list(self._unwrapped_model.parameters())
            yield from (parameter.ds_tensor for parameter in partitioned)
        if not self.config.steps_on_cpu:
            return
        for master in self._flat_masters:
            yield master
            if master.grad is not None:
                yield master.grad
        yield from optimizer_tensors(self.optimizer)
        # Gradient buffers of stage 2 and of stage 3.
        for name in ("temp_grad_buffer_for_cpu_offload", "grad_partitions_flat_buffer"):
            if hasattr(self._zero, name):
                yield getattr(self._zero, name)

    def describe(self) -> str:
        sharded = ["optimizer state", "gradients", "parameters"][: self.config.stage]
        zero = self.engine_config["zero_optimization"]
        offload = "".join(
            f", {tensors} on {zero[section]['device']}"
            for section, tensors in OFFLOADED.items()
            if section in zero and zero[section]["device"] != "none"
        )
        ranks, device = self.rank_info.world_size, self.rank_info.device.type
        split = f"{', '.join(sharded)} sharded over {ranks} ranks" if ranks > 1 else "one rank"
        return f"{self.config.name}: DeepSpeed, {split} on {device}{offload}"

    def warning(self) -> str | None:
        return None

    def _clear_stale_gradients(self) -> None:
        """Zero the gradients of parameters that got none in this step: the engine keeps its
        gradient buffers from one step to the next."""
        buffers: Sequence[Any]
        if self.config.steps_on_cpu:
            buffers = [master.grad for master in self._flat_masters]
        elif self.config.stage == 3:
            sizes = [master.numel() for master in self._flat_masters]
            buffers = self._zero.grad_partitions_flat_buffer.split(sizes)
        else:
            return
        zero, is_zero3 = self._zero, self.config.stage == 3
        with_gradient = (
            zero._offload_boundary_param_ids if is_zero3 else zero._offload_accumulated_param_ids
        )
        for parameter in self._trained.values():
            if zero.get_param_id(parameter) not in with_gradient:
                part = self._flat_range(parameter)
                buffers[part.buffer][part.in_buffer].zero_()

    @property
    def _flat_masters(self) -> list[torch.Tensor]:
        """The flat buffers of master weights that the optimizer steps."""
        if self.config.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [group["params"][0] for group in self.optimizer.param_groups]

    def _flat_range(self, parameter: Any) -> FlatRange:
        if self.config.stage == 3:
            buffer, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            return FlatRange(buffer, offset, *partition_of(parameter.ds_numel, self.rank_info))
        mapping = parameter._hp_mapping
        if mapping is None:  # the parameter is in the partitions of other ranks
            return FlatRange(self._group_of[id(parameter)], 0, 0, 0)
        address = mapping.lp_fragment_address
        offset = mapping.get_hp_fragment_address().start
        return FlatRange(mapping.param_group_index, offset, address.start, address.numel)

    def _buffer_states(self) -> list[dict[str, Any]]:
        """The optimizer's state of each flat buffer. Under zero3, the engine shows one buffer at a
        time to the optimizer during a step, and none between steps."""
        if self.config.stage < 3:
            return get_or_create_state(self.optimizer, self._flat_masters)
        params_before = [group["params"] for group in self.optimizer.param_groups]
        group_of_buffer = self._zero.sub_group_to_group_id
        for index, group in enumerate(self.optimizer.param_groups):
            group["params"] = [
                master
                for buffer, master in enumerate(self._flat_masters)
                if group_of_buffer[buffer] == index
            ]
        states = get_or_create_state(self.optimizer, self._flat_masters)
        for group, params in zip(self.optimizer.param_groups, params_before, strict=True):
            group["params"] = params
        return states
