"""Gathering sharded tensors in one message."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, offsets) of this rank's part of a sharded tensor."""
    shape, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(shape), tuple(offsets)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_to_main(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Whole copies of `tensors` on the CPU of rank 0, None on the other ranks. Collective.

    The local shards of all tensors travel as one flat buffer in one gather over the `shard` axis;
    replicated copies are not sent. All must have one dtype and shard dim 0, if any.
    """
    sharded = {n: t for n, t in tensors.items() if isinstance(t, DTensor) and _is_split(t)}
    whole = {
        name: local_part(t).detach().to("cpu", copy=True)
        for name, t in tensors.items()
        if name not in sharded
    }
    if sharded:
        whole.update(_gather_shards(sharded))
    return {name: whole[name] for name in tensors} if dist.get_rank() == 0 else None


def _is_split(tensor: DTensor) -> bool:
    """Whether more than one rank holds a part of it."""
    return any(
        isinstance(placement, Shard) and tensor.device_mesh.size(axis) > 1
        for axis, placement in enumerate(tensor.placements)
    )


def _gather_shards(sharded: dict[str, DTensor]) -> dict[str, torch.Tensor]:
    """The tensors whole on the first rank of this shard group, empty on the others."""
    first = next(iter(sharded.values()))
    axis = next(i for i, placement in enumerate(first.placements) if isinstance(placement, Shard))
    group, ranks = first.device_mesh.get_group(axis), first.device_mesh.size(axis)
    dtypes = {tensor.dtype for tensor in sharded.values()}
    if len(dtypes) > 1 or any(tensor.placements != first.placements for tensor in sharded.values()):
        raise ValueError(f"one gather carries one dtype and one placement, got {dtypes}")

    # Rank i holds rows [i·k, (i+1)·k) with k = ⌈rows / ranks⌉, the rule of torch.chunk.
    def elements(tensor: DTensor, rank: int) -> int:
        rows = tensor.shape[0]
        k = -(-rows // ranks)
        held = max(0, min(rows, (rank + 1) * k) - rank * k)
        return held * (tensor.numel() // rows if rows else 0)

    longest = max(sum(elements(t, rank) for t in sharded.values()) for rank in range(ranks))
    flat = torch.zeros(longest, dtype=first.dtype, device=first.device)
    mine = torch.cat([tensor.to_local().detach().flatten() for tensor in sharded.values()])
    flat[: mine.numel()] = mine
    receiver = dist.get_group_rank(group, dist.get_rank()) == 0
    parts = [torch.empty_like(flat) for _ in range(ranks)] if receiver else None
    dist.gather(flat, parts, group=group, group_dst=0)
    if parts is None:
        return {}
    parts = [part.cpu() for part in parts]
    whole: dict[str, torch.Tensor] = {}
    at = [0] * ranks
    for name, tensor in sharded.items():
        pieces = []
        for rank in range(ranks):
            size = elements(tensor, rank)
            pieces.append(parts[rank][at[rank] : at[rank] + size])
            at[rank] += size
        whole[name] = torch.cat(pieces).view(tensor.shape)
    return whole
