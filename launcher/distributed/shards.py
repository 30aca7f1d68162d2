"""The part of a tensor that a rank has, whatever strategy sharded it.

ZeRO's flat partitions, FSDP2's row shards and full copies are ranges of the tensor in row-major
order. FSDP2's shards along another dim are the same range of every block before that dim.
Gathering, saving and loading use nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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
