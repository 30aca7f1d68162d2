"""What a rank holds of a tensor, whatever spread it: a run of its elements.

FSDP2's row shards, ZeRO's flat partitions and whole copies are all runs of the tensor in row-major
order. Gathering, saving and loading know nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Shard:
    """This rank's run of a tensor's elements."""

    local: torch.Tensor  # 1-d; shares storage with what training uses
    begin: int  # of the run, in elements of the flattened tensor
    shape: tuple[int, ...]  # of the whole tensor

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.local.element_size()

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same run of another tensor of the same shape."""
        return whole.flatten()[self.begin : self.begin + self.local.numel()]


def shard_of(tensor: torch.Tensor) -> Shard:
    """This rank's run of a whole tensor, or of a DTensor that is split by rows at most."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Shard(tensor.view(-1), 0, tuple(tensor.shape))
    if any(isinstance(p, Split) and p.dim != 0 for p in tensor.placements):
        raise ValueError(f"only row shards are runs of elements, got {tensor.placements}")
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
    """What this rank holds of a tensor, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_to_main(
    shards: Mapping[str, Shard], group: dist.ProcessGroup | None = None
) -> dict[str, torch.Tensor] | None:
    """Whole copies on the CPU of rank 0, None on the other ranks. Collective.

    The runs of all tensors travel as one flat buffer in one gather over `group`, the ranks that
    together hold one copy (None: all ranks). Each dtype travels alone.
    """
    whole: dict[str, torch.Tensor] = {}
    for dtype in dict.fromkeys(shard.local.dtype for shard in shards.values()):
        alike = {name: shard for name, shard in shards.items() if shard.local.dtype == dtype}
        whole |= _gather(alike, group) or {}
    return {name: whole[name] for name in shards} if dist.get_rank() == 0 else None


def _gather(
    shards: Mapping[str, Shard], group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor] | None:
    """`gather_to_main` of tensors of one dtype."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        whole = {n: s.local.to("cpu", copy=True).view(s.shape) for n, s in shards.items()}
        return whole if dist.get_rank() == 0 else None
    # The paged state of an optimizer on a GPU says that it is on the CPU.
    devices = [shard.local.device for shard in shards.values()]
    device = max(devices, key=lambda each: each.type != "cpu")
    flat = torch.cat([shard.local.to(device) for shard in shards.values()])
    runs = torch.tensor([(s.begin, s.local.numel()) for s in shards.values()], device=flat.device)
    runs_of = [torch.empty_like(runs) for _ in range(ranks)]
    dist.all_gather(runs_of, runs, group=group)
    longest = max(int(each[:, 1].sum()) for each in runs_of)
    padded = torch.cat([flat, flat.new_zeros(longest - flat.numel())])
    receiver = dist.get_rank(group) == 0
    parts = [torch.empty_like(padded) for _ in range(ranks)] if receiver else None
    dist.gather(padded, parts, group=group, group_dst=0)
    if parts is None or dist.get_rank() != 0:
        return None
    return _joined(shards, [part.cpu() for part in parts], [each.tolist() for each in runs_of])


def _joined(
    shards: Mapping[str, Shard], parts: list[torch.Tensor], runs_of: list[list[list[int]]]
) -> dict[str, torch.Tensor]:
    """Tensors from the flat buffer of each rank and the (begin, count) of its runs."""
    whole: dict[str, torch.Tensor] = {}
    at = [0] * len(parts)
    for number, (name, shard) in enumerate(shards.items()):
        tensor = torch.empty(math.prod(shard.shape), dtype=parts[0].dtype)
        filled = 0
        for rank, part in enumerate(parts):
            begin, count = runs_of[rank][number]
            tensor[begin : begin + count] = part[at[rank] : at[rank] + count]
            at[rank] += count
            filled += count
        if filled != tensor.numel():
            raise RuntimeError(f"{name}: ranks hold {filled} of its {tensor.numel()} elements")
        whole[name] = tensor.view(shard.shape)
    return whole
