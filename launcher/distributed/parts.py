"""The boxes of a tensor that each rank has, and the one rank that passes each of them on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.distributed.collectives import on_all_ranks
from launcher.distributed.shards import Shard
from launcher.io.boxes import Box

Layout = Sequence[Sequence[Box]]  # of a rank: its boxes of each tensor
Chosen = list[list[int]]  # of a rank: the positions in its layout of the boxes that it passes on


def parts_of(shard: Shard) -> list[tuple[Box, torch.Tensor]]:
    """The boxes that this rank has of a tensor, with their values: contiguous views."""
    parts, start = [], 0
    for box in shard.boxes():
        count = math.prod(box[1])
        parts.append((box, shard.local[start : start + count].view(box[1])))
        start += count
    return parts


@dataclass(frozen=True)
class Shares:
    """Who passes what on. The first two are only on rank 0."""

    layouts: list[Layout]  # of every rank
    chosen: list[Chosen]  # of every rank
    own: Chosen  # of this rank


def exchange(shards: Sequence[Shard], group: dist.ProcessGroup | None, to_main: bool) -> Shares:
    """Agree on one rank for each box of the tensors of `shards`, which all ranks have in the same
    order. Collective.

    A box that several ranks have goes to the one that has the least to do; with `to_main`, to rank
    0 if it has the box. Raises UserError if the boxes of a tensor are not the whole tensor.
    """
    is_main = dist.get_rank(group) == 0
    shapes = [shard.shape for shard in shards]
    layout = [[box for box, _ in parts_of(shard)] for shard in shards]
    layouts: list[Layout] = [[]] * dist.get_world_size(group) if is_main else []
    dist.gather_object(layout, layouts if is_main else None, group=group, group_dst=0)
    chosen = on_all_ranks(lambda: choose(layouts, shapes, to_main) if is_main else [], group)
    own: list[Chosen] = [[]]
    dist.scatter_object_list(own, chosen if is_main else None, group=group, group_src=0)
    return Shares(layouts, chosen, own[0])


def choose(
    layouts: Sequence[Layout], shapes: Sequence[tuple[int, ...]], to_main: bool
) -> list[Chosen]:
    """What each rank passes on; see `exchange`."""
    chosen: list[Chosen] = [[[] for _ in shapes] for _ in layouts]
    elements = [0] * len(layouts)
    if to_main:
        elements[0] = -sum(map(math.prod, shapes)) - 1
    for number, shape in enumerate(shapes):
        holders: defaultdict[Box, list[tuple[int, int]]] = defaultdict(list)
        for rank, layout in enumerate(layouts):
            for position, box in enumerate(layout[number]):
                holders[box].append((rank, position))
        for (_, sizes), candidates in holders.items():
            rank, position = min(candidates, key=lambda each: elements[each[0]])
            chosen[rank][number].append(position)
            elements[rank] += math.prod(sizes)
        found = sum(math.prod(sizes) for _, sizes in holders)
        if found != math.prod(shape):
            raise RuntimeError(
                f"ranks have {found} of the {math.prod(shape)} elements of tensor {number}"
            )
    return chosen
