"""The part of a tensor that a rank has, whatever strategy sharded it: a flat range of elements.

FSDP2's row shards, ZeRO's flat partitions and full copies are all ranges of the tensor in row-major
order. Gathering, saving and loading use nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Shard:
    """This rank's flat range of a tensor."""

    local: torch.Tensor  # 1-d; shares storage with the tensor that training uses
    begin: int  # of the range, in elements of the flattened tensor
    shape: tuple[int, ...]  # of the full tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return math.prod(self.shape) * self.local.element_size()

    def slice_of(self, full: torch.Tensor) -> torch.Tensor:
        """The same range of another tensor of the same shape. 1-d."""
        return full.flatten()[self.begin : self.begin + self.local.numel()]


def shard_of(tensor: torch.Tensor) -> Shard:
    """This rank's range of an unsharded tensor, or of a DTensor.

    Raises ValueError for a DTensor that is sharded on another dim than 0.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Shard(tensor.view(-1), 0, tuple(tensor.shape))
    if any(isinstance(p, ShardPlacement) and p.dim != 0 for p in tensor.placements):
        raise ValueError(f"only row shards are flat ranges, got {tensor.placements}")
    _, offsets = local_box(tensor)
    row = math.prod(tensor.shape[1:])
    begin = offsets[0] * row if offsets else 0
    return Shard(tensor.to_local().view(-1), begin, tuple(tensor.shape))


def local_box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, offsets) of this rank's part of a sharded tensor."""
    shape, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(shape), tuple(offsets)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_to_main(
    shards: Mapping[str, Shard], group: dist.ProcessGroup | None = None
) -> dict[str, torch.Tensor] | None:
    """The full tensors on the CPU of rank 0, None on the other ranks. Collective.

    The ranges of all tensors travel as one flat buffer in one gather per dtype over `group`, the
    ranks that share one copy (None: all ranks).
    """
    full: dict[str, torch.Tensor] = {}
    for dtype in dict.fromkeys(shard.local.dtype for shard in shards.values()):
        same_dtype = {name: shard for name, shard in shards.items() if shard.local.dtype == dtype}
        full |= _gather(same_dtype, group) or {}
    return {name: full[name] for name in shards} if dist.get_rank() == 0 else None


def _gather(
    shards: Mapping[str, Shard], group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor] | None:
    """`gather_to_main` of tensors of one dtype."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        full = {n: s.local.to("cpu", copy=True).view(s.shape) for n, s in shards.items()}
        return full if dist.get_rank() == 0 else None
    # The paged state of an optimizer on a GPU reports that it is on the CPU.
    devices = [shard.local.device for shard in shards.values()]
    device = max(devices, key=lambda each: each.type != "cpu")
    flat = torch.cat([shard.local.to(device) for shard in shards.values()])
    ranges = torch.tensor([(s.begin, s.local.numel()) for s in shards.values()], device=flat.device)
    ranges_by_rank = [torch.empty_like(ranges) for _ in range(ranks)]
    dist.all_gather(ranges_by_rank, ranges, group=group)
    longest = max(int(each[:, 1].sum()) for each in ranges_by_rank)
    padded = torch.cat([flat, flat.new_zeros(longest - flat.numel())])
    receives = dist.get_rank(group) == 0
    buffers = [torch.empty_like(padded) for _ in range(ranks)] if receives else None
    dist.gather(padded, buffers, group=group, group_dst=0)
    if buffers is None or dist.get_rank() != 0:
        return None
    return _assemble(
        shards, [buffer.cpu() for buffer in buffers], [each.tolist() for each in ranges_by_rank]
    )


def _assemble(
    shards: Mapping[str, Shard],
    buffers: list[torch.Tensor],
    ranges_by_rank: list[list[list[int]]],
) -> dict[str, torch.Tensor]:
    """The full tensors, from the flat buffer of each rank and the (begin, count) of its ranges."""
    full: dict[str, torch.Tensor] = {}
    positions = [0] * len(buffers)
    for number, (name, shard) in enumerate(shards.items()):
        tensor = torch.empty(math.prod(shard.shape), dtype=buffers[0].dtype)
        filled = 0
        for rank, buffer in enumerate(buffers):
            begin, count = ranges_by_rank[rank][number]
            position = positions[rank]
            tensor[begin : begin + count] = buffer[position : position + count]
            positions[rank] += count
            filled += count
        if filled != tensor.numel():
            raise RuntimeError(f"{name}: ranks have {filled} of its {tensor.numel()} elements")
        full[name] = tensor.view(shard.shape)
    return full
