"""A run of elements of a row-major tensor, as boxes of its shape.

Sharded state comes as runs: FSDP2 gives a rank whole rows, ZeRO any stretch of the flattened
tensor. Files are read, and distributed checkpoints written, in boxes. Imports no torch.
"""

from __future__ import annotations

import math

Box = tuple[tuple[int, ...], tuple[int, ...]]  # (offsets, sizes), one of each per dim


def boxes(begin: int, count: int, shape: tuple[int, ...]) -> list[Box]:
    """Elements [begin, begin + count) of a tensor of `shape`, as boxes in the order of the run.

    At most 2·dims − 1 of them; whole rows are one. Elements of a box are contiguous in the run.
    """
    if count == 0:
        return []
    if len(shape) == 0:
        return [((), ())]
    row = math.prod(shape[1:])
    first, inside = divmod(begin, row)
    found: list[Box] = []
    if inside or count < row:  # the run begins, and perhaps ends, within a row
        head = min(count, row - inside)
        found += [((first, *at), (1, *size)) for at, size in boxes(inside, head, shape[1:])]
        first, count = first + 1, count - head
    rows, rest = divmod(count, row)
    if rows:
        found.append(((first, *(0 for _ in shape[1:])), (rows, *shape[1:])))
    tail = boxes(0, rest, shape[1:])
    return [*found, *(((first + rows, *at), (1, *size)) for at, size in tail)]
