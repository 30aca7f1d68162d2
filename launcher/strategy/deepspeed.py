"""zero1, zero2 and zero3: DeepSpeed's engine, driven behind the same verbs.

The JSON comes from `launcher.config.deepspeed`. Six things are done here because DeepSpeed would
do them silently wrong or at the price of the whole model on every rank:

* Under zero3 each rank reads its own partition of every parameter from the files, and the model is
  built as everywhere else: `zero.Init` around the building would initialise over loaded embeddings,
  round rotary frequencies and break adapters.
* Under zero3 gathered weights are not kept from forward to backward (`launcher.strategy.freed`).
* Masters begin at the stored value, not at its rounding to the working dtype.
* After masters were read back the working copies are made from them.
* A parameter that got no gradient in a step is not stepped by an old one.
* Under offload a gradient that overflowed is not added to that of the next step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from launcher.config.deepspeed import engine_config
from launcher.config.precision import PrecisionConfig
from launcher.config.strategy import Zero3Config, ZeroConfig
from launcher.config.training import TrainingConfig
from launcher.distributed.process_group import Place
from launcher.distributed.shards import Shard, gather_to_main
from launcher.errors import UserError
from launcher.loss_scale import LossScale
from launcher.model.load import Weights
from launcher.model.stored import Stored, read_run, read_whole
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
from launcher.strategy.freed import keep_parameters

# Without GPUs gloo does all. DeepSpeed would compile an all-reduce of its own at the first start;
# a start that is killed while it compiles leaves a lock behind on which every later one waits.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

OFFLOADED = {"offload_optimizer": "masters and moments", "offload_param": "parameters"}


class DeepSpeed:
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self, config: ZeroConfig, training: TrainingConfig, place: Place, precision: Precision
    ) -> None:
        self.config = config
        self.place = place
        self.precision = precision
        self.loss_scale = LossScale.of(precision.scaling) if precision.scaling else None
        if self.loss_scale and not get_accelerator().is_fp16_supported():
            raise UserError(
                f"precision=fp16 with strategy={config.name}: DeepSpeed reports no fp16 on "
                f"{place.device.type}; choose precision=bf16, or strategy=fsdp"
            )
        if config.steps_on_cpu:
            share_cores(place)
        arithmetic = precision.scaling or PrecisionConfig(name=precision.name)
        self.engine_config = engine_config(config, training, arithmetic, place.world_size)

    def setup(
        self, model: nn.Module, weights: Weights | None, build_optimizer: OptimizerBuilder
    ) -> None:
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._shapes = {name: parameter.shape for name, parameter in self._trained.items()}
        stored = {i: slot.stored for i, slot in weights.by_parameter().items()} if weights else {}
        # The working dtype cannot hold what adapters begin with.
        exact = {n: p.detach().clone() for n, p in self._trained.items() if not p.is_meta}
        deepspeed.init_distributed()  # takes over the process group that stands
        self._load(model, stored)
        self.optimizer = build_optimizer(
            (name, parameter, self._shapes[name]) for name, parameter in self._trained.items()
        )
        self._group_of = {
            id(parameter): number
            for number, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
        }
        self._bare = model
        self.model, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=self.engine_config,
            dist_init_required=False,
        )
        if self.loss_scale:
            # Ours decides, after the step: a scale that grew in it would unscale its gradients too.
            self._zero.loss_scaler.update_scale = lambda has_overflow: None
        for name, shard in self.weights().items():
            if name in exact:
                shard.local.copy_(shard.of(exact[name]))
                continue
            source = stored[id(self._trained[name])]
            if source.dtype.itemsize > self.precision.compute.itemsize:
                shard.local.copy_(read_run(source, shard.begin, shard.local.numel()))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(values)

    def accumulate(self, last: bool) -> None:
        """Nothing to do: `step` ends the accumulation, however many micro-batches there were."""

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages gradients over all ranks; undo it.
        self.model.backward(loss * self.place.world_size, scale_wrt_gas=False)  # type: ignore[operator]

    def forget(self) -> None:
        raise RuntimeError("DeepSpeed keeps them in buffers of its own")

    def step(self, max_norm: float) -> StepResult:
        self._clear_old_gradients()
        self._zero.clip_grad = max_norm
        scale = self.loss_scale.scale if self.loss_scale else None
        self.model.step()  # type: ignore[operator]
        applied = not getattr(self._zero, "overflow", False)
        norm = self.model.get_global_grad_norm() if applied else math.inf  # type: ignore[operator]
        if self.config.steps_on_cpu and not applied:
            self._zero.averaged_gradients.clear()
        if self.loss_scale:
            self.loss_scale.update(not applied)
            self._zero.loss_scaler.cur_scale = self.loss_scale.scale
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.place.device)
        return StepResult(norm, applied, loss_scale=scale)

    def weights(self) -> dict[str, Shard]:
        shards = {}
        for name, parameter in self._trained.items():
            flat, at, begin, count = self._run(parameter)
            local = self._flats[flat].detach()[at : at + count]
            shards[name] = Shard(local, begin, tuple(self._shapes[name]))
        return shards

    def state(self) -> TrainedState:
        states = self._optimizer_states()
        weights, parts = self.weights(), []
        for parameter in self._trained.values():
            flat, at, _, count = self._run(parameter)
            parts.append(
                {
                    key: value[at : at + count] if torch.is_tensor(value) and value.ndim else value
                    for key, value in states[flat].items()
                }
            )
        shards = self.place.world_size
        moments, counts = split_state(weights, parts, shards)
        return TrainedState(weights, moments, counts, persistent_buffers(self._bare), shards)

    def refresh(self) -> None:
        if self.loss_scale:
            self._zero.loss_scaler.cur_scale = self.loss_scale.scale
        if self.config.stage < 3:
            self._zero.update_lp_params()
            return
        copies = self._zero.fp16_partitioned_groups_flat
        for number, (flat, working) in enumerate(zip(self._flats, copies, strict=True)):
            if working is None:  # on disk
                self._zero._partitioned_params_swap_out(number)
            else:
                working.copy_(flat.detach())
        if kept_whole := self._zero.persistent_parameters:
            kept_whole[0].partition(kept_whole)
            kept_whole[0].all_gather(kept_whole)

    def gather(self, shards: dict[str, Shard]) -> dict[str, torch.Tensor] | None:
        return gather_to_main(shards)

    def on_host(self) -> Iterator[torch.Tensor]:
        if self.config.parameters_on_cpu:
            bare: list[Any] = list(self._bare.parameters())
            yield from (parameter.ds_tensor for parameter in bare)
        if not self.config.steps_on_cpu:
            return
        yield from (each for flat in self._flats for each in (flat, flat.grad) if each is not None)
        yield from moments_of(self.optimizer)
        for name in ("temp_grad_buffer_for_cpu_offload", "grad_partitions_flat_buffer"):
            if hasattr(self._zero, name):  # of stage 2, of stage 3
                yield getattr(self._zero, name)

    def describe(self) -> str:
        sharded = ["optimizer state", "gradients", "parameters"][: self.config.stage]
        zero = self.engine_config["zero_optimization"]
        kept = "".join(
            f", {what} on {zero[section]['device']}"
            for section, what in OFFLOADED.items()
            if section in zero and zero[section]["device"] != "none"
        )
        return (
            f"{self.config.name}: DeepSpeed, {', '.join(sharded)} sharded over "
            f"{self.place.world_size} rank(s) on {self.place.device.type}{kept}"
        )

    def _clear_old_gradients(self) -> None:
        """Of parameters that got none in this step: they lie in buffers that the engine keeps."""
        if self.config.steps_on_cpu:
            buffers = [flat.grad for flat in self._flats]
        elif self.config.stage == 3:
            sizes = [flat.numel() for flat in self._flats]
            buffers = self._zero.grad_partitions_flat_buffer.split(sizes)
        else:
            return
        zero, zero3 = self._zero, self.config.stage == 3
        got = zero._offload_boundary_param_ids if zero3 else zero._offload_accumulated_param_ids
        for parameter in self._trained.values():
            if zero.get_param_id(parameter) not in got:
                flat, at, _, count = self._run(parameter)
                buffers[flat][at : at + count].zero_()

    def _load(self, model: nn.Module, stored: dict[int, Stored]) -> None:
        """Give every parameter its values in the working dtype; under zero3 each rank reads and
        keeps its own partition."""
        self._refuse_small_buffers(model)
        init = None
        if self.config.stage == 3:
            init = Init(config_dict_or_path=self.engine_config)
            keep_parameters(model)
        for parameter in model.parameters():
            floating = parameter.is_floating_point()  # quantised ones stay as they are
            dtype = self.precision.compute if floating else parameter.dtype
            if not parameter.is_meta:
                whole = parameter.detach()
            elif init is None:
                whole = read_whole(stored[id(parameter)])
            else:
                whole = self._own_part(parameter, stored[id(parameter)], dtype)
            # In place, so that tied modules see it.
            whole = whole.to(self.place.device, dtype)
            torch.utils.swap_tensors(
                parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad)
            )
            if init is not None:
                init._convert_to_deepspeed_param(parameter)
                parameter.partition()  # type: ignore[attr-defined]

    def _refuse_small_buffers(self, model: nn.Module) -> None:
        if not isinstance(self.config, Zero3Config) or not self.config.on_disk:
            return
        size = self.config.nvme_buffer_size
        parts = {name: self._partition(p.numel())[1] for name, p in model.named_parameters()}
        largest = max(parts, key=lambda name: parts[name])
        if parts[largest] > size:
            raise UserError(
                f"strategy.nvme_buffer_size={size} is less than a rank's part of {largest}; "
                f"strategy.nvme_buffer_size={parts[largest]}, or more ranks"
            )

    def _own_part(
        self, parameter: nn.Parameter, stored: Stored, dtype: torch.dtype
    ) -> torch.Tensor:
        """The parameter, of which only this rank's partition holds values: no other is kept."""
        whole = torch.empty(parameter.shape, dtype=dtype)
        begin, count = self._partition(parameter.numel())
        whole.view(-1)[begin : begin + count] = read_run(stored, begin, count)
        return whole

    def _partition(self, numel: int) -> tuple[int, int]:
        """(begin, count) of this rank's partition of a tensor under zero3: ⌈numel / ranks⌉ each."""
        k = -(-numel // self.place.world_size)
        begin = min(self.place.rank * k, numel)
        return begin, min(k, numel - begin)

    @property
    def _flats(self) -> list[Any]:
        """The flat master weights that the optimizer steps."""
        if self.config.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [group["params"][0] for group in self.optimizer.param_groups]

    def _run(self, parameter: Any) -> tuple[int, int, int, int]:
        """Where this rank's part of a trained parameter is: (number of the flat tensor, offset in
        it, first element of the parameter, count)."""
        if self.config.stage == 3:
            flat, at, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            return (flat, at, *self._partition(parameter.ds_numel))
        mapping = parameter._hp_mapping
        if mapping is None:  # it lies in other ranks' partitions
            return self._group_of[id(parameter)], 0, 0, 0
        run = mapping.lp_fragment_address
        flat = mapping.param_group_index
        return flat, mapping.get_hp_fragment_address().start, run.start, run.numel

    def _optimizer_states(self) -> list[dict[str, Any]]:
        """The optimizer's state of each flat tensor. Under zero3 the engine shows the optimizer one
        flat tensor at a time, and none in between."""
        if self.config.stage < 3:
            return list(optimizer_state(self.optimizer, self._flats))
        shown = [group["params"] for group in self.optimizer.param_groups]
        groups = self._zero.sub_group_to_group_id
        for number, group in enumerate(self.optimizer.param_groups):
            group["params"] = [f for at, f in enumerate(self._flats) if groups[at] == number]
        states = list(optimizer_state(self.optimizer, self._flats))
        for group, before in zip(self.optimizer.param_groups, shown, strict=True):
            group["params"] = before
        return states
