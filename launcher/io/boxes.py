"""Converts a run of elements of a row-major tensor to boxes of its shape.

Sharded state comes in runs: FSDP2 gives a rank whole rows, of a tensor or of each block of it, and
ZeRO any range of the flattened tensor. Files are read, and distributed checkpoints written, in
boxes. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

Box = tuple[tuple[int, ...], tuple[int, ...]]  # (offsets, sizes), one value for each dim


def boxes(begin: int, count: int, shape: tuple[int, ...]) -> list[Box]:
    """Elements [begin, begin + count) of a tensor of `shape`, as boxes in the order of the run.

    There are at most 2·dims − 1 boxes; whole rows are one box. The elements of a box are contiguous
    in the run.
    """
    if count == 0:
        return []
    if len(shape) == 0:
        return [((), ())]
    row = math.prod(shape[1:])
    first, inside = divmod(begin, row)
    result: list[Box] = []
    if inside or count < row:  # the run starts, and perhaps ends, within a row
        head = min(count, row - inside)
        inner = boxes(inside, head, shape[1:])
        result += [((first, *offsets), (1, *sizes)) for offsets, sizes in inner]
        first, count = first + 1, count - head
    rows, rest = divmod(count, row)
    if rows:
        result.append(((first, *(0 for _ in shape[1:])), (rows, *shape[1:])))
    tail = boxes(0, rest, shape[1:])
    return [*result, *(((first + rows, *offsets), (1, *sizes)) for offsets, sizes in tail)]


def runs(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, Box]]:
    """`box` of a tensor of `shape` as runs of elements that follow each other: the first element,
    and the run as a box relative to `box`."""
    if not shape:
        yield 0, box
        return
    offsets, sizes = box
    dim = len(shape) - 1  # the outermost dim of a run
    while dim > 0 and sizes[dim] == shape[dim]:
        dim -= 1
    strides = [math.prod(shape[after + 1 :]) for after in range(len(shape))]
    inner = sum(o * stride for o, stride in zip(offsets[dim:], strides[dim:], strict=True))
    rest = len(shape) - dim
    for index in itertools.product(*(range(size) for size in sizes[:dim])):
        outer = sum((o + i) * stride for o, i, stride in zip(offsets, index, strides, strict=False))
        yield outer + inner, ((*index, *[0] * rest), (*[1] * dim, *sizes[dim:]))


def intersection(one: Box, other: Box) -> Box | None:
    """The elements that two boxes have in common, None if there are none."""
    offsets = tuple(map(max, one[0], other[0]))
    ends = (
        min(first + size, second + length)
        for first, size, second, length in zip(*one, *other, strict=True)
    )
    sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
    return (offsets, sizes) if all(size > 0 for size in sizes) else None
