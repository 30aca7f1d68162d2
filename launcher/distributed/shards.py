"""The part of a tensor that a rank has, whatever strategy sharded it: a flat range of elements.

FSDP2's row shards, ZeRO's flat partitions and full copies are all ranges of the tensor in row-major
order. Gathering, saving and loading use nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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
