"""Load a model for DeepSpeed's engine, on the device of the rank. Under zero3 each rank reads only
its own partition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.partition_parameters import Init, register_external_parameter
from torch import nn

from launcher.config.schema.strategy import Zero3Config
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.io.weight_views import LazyWeight, read_flat_into, read_into
from launcher.model.peft import ParamWrapper
from launcher.strategy.zero3_saved_tensors import save_parameters_not_views


class FlatRange(NamedTuple):
    """Where this rank's part of a trained parameter is stored."""

    buffer: int  # index into `_flat_masters`
    offset: int  # in that buffer
    start: int  # first element of the flattened parameter
    numel: int

    @property
    def in_buffer(self) -> slice:
        """The part's elements in its buffer."""
        return slice(self.offset, self.offset + self.numel)


def load_weights(
    model: nn.Module,
    sources: dict[int, LazyWeight],
    rank_info: RankInfo,
    compute: torch.dtype,
    zero3: Mapping[str, Any] | None,
) -> None:
    """Load every parameter of `model` in the working dtype `compute`, and move its buffers.

    `sources`: id of a parameter on meta → its stored tensor. `zero3`: the engine's configuration
    under zero3, where each rank reads and keeps its own partition; None under zero1 and zero2.
    """
    init = None
    if zero3 is not None:
        init = Init(config_dict_or_path=zero3)
        save_parameters_not_views(model)
    for parameter in model.parameters():
        is_floating = parameter.is_floating_point()  # quantized parameters keep their dtype
        dtype = compute if is_floating else parameter.dtype
        if not parameter.is_meta:
            full = parameter.detach()
        elif init is None:
            full = torch.empty(parameter.shape, dtype=dtype, device=rank_info.device)
            read_into(sources[id(parameter)], full, (0,) * parameter.ndim)
        else:
            full = _read_own_partition(parameter, sources[id(parameter)], dtype, rank_info)
        # In place, so that tied modules see the new tensor.
        full = full.to(rank_info.device, dtype)
        torch.utils.swap_tensors(
            parameter, nn.Parameter(full, requires_grad=parameter.requires_grad)
        )
        if init is not None:
            init._convert_to_deepspeed_param(parameter)
            parameter.partition()  # type: ignore[attr-defined]
    _move_buffers(model, rank_info.device)
    if init is not None:
        _announce_adapted_parameters(model)


def check_nvme_buffer_size(config: Zero3Config, model: nn.Module, rank_info: RankInfo) -> None:
    """Raises UserError if a rank's part of a parameter does not fit into a buffer of the disk."""
    if not config.on_disk:
        return
    size = config.nvme_buffer_size
    sizes = {name: partition_of(p.numel(), rank_info)[1] for name, p in model.named_parameters()}
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > size:
        raise UserError(
            f"strategy.nvme_buffer_size={size} is less than a rank's part of {largest}; "
            f"strategy.nvme_buffer_size={sizes[largest]}, or more ranks"
        )


def partition_of(numel: int, rank_info: RankInfo) -> tuple[int, int]:
    """(start, count) of this rank's partition of a tensor under zero3: ⌈numel / ranks⌉ elements
    for each rank."""
    partition_numel = -(-numel // rank_info.world_size)
    start = min(rank_info.rank * partition_numel, numel)
    return start, min(partition_numel, numel - start)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move all buffers to `device`, persistent or not. The engine moves none under zero3: it takes
    the parameters to be where they belong, and the buffers with them."""
    moved = {id(buffer): buffer.to(device) for buffer in model.buffers()}  # may have two names
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = moved[id(buffer)]


def _announce_adapted_parameters(model: nn.Module) -> None:
    """Tell DeepSpeed that fused experts and routers with adapters use their own weights.

    PEFT replaces such a weight by a property while it computes. DeepSpeed lists the parameters of
    all modules after the first backward, and would refuse the second forward, in which a module
    seems to lack one of them.
    """
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            register_external_parameter(module.get_base_layer(), module.get_param())


def _read_own_partition(
    parameter: nn.Parameter, source: LazyWeight, dtype: torch.dtype, rank_info: RankInfo
) -> torch.Tensor:
    """A tensor with the full shape, in which only this rank's partition is initialized: the rest is
    never used."""
    full = torch.empty(parameter.shape, dtype=dtype, device=rank_info.device)
    start, count = partition_of(parameter.numel(), rank_info)
    read_flat_into(source, full.view(-1)[start : start + count], start)
    return full
