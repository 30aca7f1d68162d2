"""The part of a tensor that a rank has, whatever strategy sharded it.

ZeRO's flat partitions, FSDP2's row shards and full copies are ranges of the tensor in row-major
order. FSDP2's shards along another dim are the same range of every block before that dim.
Gathering, saving and loading use nothing else.
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

from launcher.io.boxes import Box, boxes


@dataclass(frozen=True)
class Shard:
    """This rank's flat range of a tensor, or of each block of it."""

    local: torch.Tensor  # 1-d; shares storage with the tensor that training uses
    begin: int  # of the range, in elements of a flattened block
    shape: tuple[int, ...]  # of the full tensor
    dim: int = 0  # a block is [shape[dim:]]: the full tensor if 0; else the range is whole rows

    @property
    def blocks(self) -> int:
        return math.prod(self.shape[: self.dim])

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return math.prod(self.shape) * self.local.element_size()

    def slice_of(self, full: torch.Tensor) -> torch.Tensor:
        """The same part of another tensor of the same shape. 1-d."""
        count = self.local.numel() // self.blocks
        return full.reshape(self.blocks, -1)[:, self.begin : self.begin + count].flatten()

    def boxes(self) -> list[Box]:
        """The part as boxes of the full tensor; `local` contains one after another."""
        before, block = self.shape[: self.dim], self.shape[self.dim :]
        count = self.local.numel() // self.blocks
        return [
            ((0,) * self.dim + offsets, before + sizes)
            for offsets, sizes in boxes(self.begin, count, block)
        ]


def shard_of(tensor: torch.Tensor) -> Shard:
    """This rank's part of an unsharded tensor, or of a DTensor that is sharded along one dim."""
    tensor = tensor.detach()
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Shard(tensor.view(-1), 0, shape)
    dim = sharded_dim(tensor)
    _, offsets = local_box(tensor)
    begin = offsets[dim] * math.prod(shape[dim + 1 :]) if shape else 0
    return Shard(tensor.to_local().view(-1), begin, shape, dim)


def sharded_dim(tensor: DTensor) -> int:
    """The dim along which a DTensor is sharded; 0 if it is not. Raises ValueError if there are
    several."""
    dims = {placed.dim for placed in tensor.placements if isinstance(placed, ShardPlacement)}
    if len(dims) > 1:
        raise ValueError(f"a shard is of one dim, got {tensor.placements}")
    return dims.pop() if dims else 0


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
    """The full tensors, from the flat buffer of each rank and the (begin, elements) of its shards.
    All ranks split a tensor along the same dim."""
    full: dict[str, torch.Tensor] = {}
    positions = [0] * len(buffers)
    for number, (name, shard) in enumerate(shards.items()):
        tensor = torch.empty(shard.shape, dtype=buffers[0].dtype)
        blocks = tensor.view(shard.blocks, -1)
        filled = 0
        for rank, buffer in enumerate(buffers):
            begin, count = ranges_by_rank[rank][number]
            position = positions[rank]
            part = buffer[position : position + count].view(shard.blocks, -1)
            blocks[:, begin : begin + part.shape[1]] = part
            positions[rank] += count
            filled += count
        if filled != tensor.numel():
            raise RuntimeError(f"{name}: ranks have {filled} of its {tensor.numel()} elements")
        full[name] = tensor
    return full
