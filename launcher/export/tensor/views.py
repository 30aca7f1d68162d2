"""Cuts, joins and transposes of tensors that are not in memory.

Slices of slices and stacks of neighbouring slices fold back into what they were cut from, so that
cutting and joining again yields the tensor that one began with.
"""

from __future__ import annotations

import itertools
import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from launcher.errors import UserError
from launcher.export.tensor.base import Rows, Stack, Tensor
from launcher.export.tensor.shapes import Beside, Columns, Reshaped, Transposed
from launcher.export.tensor.stored import Stored

LARGEST_MATRIX = 128 << 20  # bytes; a transposed tensor holds one such matrix for each thread
MOST_PARTS = 1 << 16  # of one joined tensor; each part is an object of about 300 bytes

_own = threading.local()


def joined(parts: Sequence[Tensor], dim: int, shape: tuple[int, ...]) -> Tensor:
    """`parts` one after the other along `dim`, as a tensor of `shape`. Raises UserError when that
    takes so many slices that memory would grow with the model."""
    dim %= len(shape)
    if len(shape) > 1 and dim == len(shape) - 1:
        return parts[0] if len(parts) == 1 else _beside(parts, shape)
    around = math.prod(shape[:dim])
    blocks = itertools.chain.from_iterable(
        _slices(part, i * (part.rows // around), part.rows // around)
        for i in range(around)
        for part in parts
    )
    return _stacked(blocks, parts[0], shape)


def narrow(tensor: Tensor, dim: int, first: int, size: int, shape: tuple[int, ...]) -> Tensor:
    """Indices [first, first + size) of `dim`, as a tensor of `shape`."""
    dims = tensor.shape
    dim %= len(dims)
    if len(dims) > 1 and dim == len(dims) - 1:
        part = tensor if size == dims[-1] else _columns(tensor, first, size)
        return reshaped(part, shape)
    inner = math.prod(dims[dim + 1 : -1]) if dim < len(dims) - 1 else 1
    blocks = itertools.chain.from_iterable(
        _slices(tensor, (i * dims[dim] + first) * inner, size * inner)
        for i in range(math.prod(dims[:dim]))
    )
    return _stacked(blocks, tensor, shape)


def transposed(tensor: Tensor, one: int, other: int) -> Tensor:
    """Dims `one` and `other` exchanged. Raises UserError when a matrix is beyond LARGEST_MATRIX."""
    dims = tensor.shape
    one, other = sorted((one % len(dims), other % len(dims)))
    order = list(range(len(dims)))
    order[one], order[other] = other, one
    shape = tuple(dims[i] for i in order)
    if one == other:
        return tensor
    if other < len(dims) - 1:
        leading = torch.arange(math.prod(dims[:-1])).view(dims[:-1])
        rows = leading.permute(order[:-1]).reshape(-1).tolist()
        return _stacked((p for row in rows for p in _slices(tensor, row, 1)), tensor, shape)
    if one != len(dims) - 2:
        raise UserError(
            f"{tensor.name}: dims {one} and {other} of {list(dims)} cannot be exchanged a tile at "
            f"a time; save the checkpoint under its names on disk with save_pretrained"
        )
    if isinstance(tensor, Transposed):
        return tensor.of
    if dims[-1] * dims[-2] * tensor.dtype.itemsize > LARGEST_MATRIX:
        raise UserError(
            f"{tensor.name} {list(dims)} is to be transposed and a matrix of it is beyond "
            f"{LARGEST_MATRIX >> 20} MiB; save the checkpoint with save_pretrained instead"
        )
    return Transposed(tensor.name, tensor.dtype, shape, tensor)


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same elements in the same order under `shape`."""
    if tensor.shape == shape:
        return tensor
    if (shape[-1] if len(shape) > 1 else 1) == tensor.columns:
        if isinstance(tensor, Stored | Rows | Stack):
            return replace(tensor, shape=shape)
        return Rows(tensor.name, tensor.dtype, shape, tensor, 0)
    if isinstance(tensor, Reshaped) and tensor.of.shape == shape:
        return tensor.of
    return Reshaped(tensor.name, tensor.dtype, shape, tensor)


def _slices(tensor: Tensor, begin: int, count: int) -> Iterator[Tensor]:
    """Rows [begin, begin + count) as slices of what `tensor` itself is cut or stacked from."""
    if not count:
        return
    if begin == 0 and count == tensor.rows and not isinstance(tensor, Stack | Rows):
        yield tensor
    elif isinstance(tensor, Rows):
        yield from _slices(tensor.of, tensor.begin + begin, count)
    elif isinstance(tensor, Stack):
        starts = _starts(tensor)
        for i in range(bisect_right(starts, begin) - 1, bisect_left(starts, begin + count)):
            part, at = tensor.of[i], starts[i]
            top, bottom = max(begin - at, 0), min(begin + count - at, part.rows)
            yield from _slices(part, top, bottom - top)
    else:
        shape = (count, tensor.columns) if len(tensor.shape) > 1 else (count,)
        yield Rows(tensor.name, tensor.dtype, shape, tensor, begin)


def _starts(stack: Stack) -> list[int]:
    """The first row of each part. Kept for the stack last asked for: one of hundreds of experts is
    asked for once for each."""
    kept: tuple[Stack, list[int]] | None = getattr(_own, "starts", None)
    if kept is None or kept[0] is not stack:
        counts = [part.rows for part in stack.of]
        _own.starts = kept = (stack, [0, *itertools.accumulate(counts[:-1])])
    return kept[1]


def _stacked(slices: Iterator[Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
    parts: list[Tensor] = []
    for part in slices:
        before = parts[-1] if parts else None
        if (
            isinstance(part, Rows)
            and isinstance(before, Rows)
            and before.of is part.of
            and before.begin + before.rows == part.begin
        ):
            parts.pop()
            parts.extend(_slices(part.of, before.begin, before.rows + part.rows))
        else:
            parts.append(part)
        if len(parts) > MOST_PARTS:
            raise UserError(
                f"{like.name}: its conversion needs more than {MOST_PARTS:,} slices; save the "
                f"checkpoint under its names on disk with save_pretrained"
            )
    if len(parts) == 1:
        return reshaped(parts[0], shape)
    return Stack(like.name, like.dtype, shape, tuple(parts))


def _columns(tensor: Tensor, begin: int, count: int) -> Tensor:
    if isinstance(tensor, Columns):
        return _columns(tensor.of, tensor.begin + begin, count)
    shape = (*tensor.shape[:-1], count)
    return Columns(tensor.name, tensor.dtype, shape, tensor, begin)


def _beside(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    merged: list[Tensor] = []
    for part in parts:
        before = merged[-1] if merged else None
        if (
            isinstance(part, Columns)
            and isinstance(before, Columns)
            and before.of is part.of
            and before.begin + before.columns == part.begin
        ):
            count = before.columns + part.columns
            whole = count == part.of.columns
            merged[-1] = part.of if whole else _columns(part.of, before.begin, count)
        else:
            merged.append(part)
    if len(merged) == 1:
        return reshaped(merged[0], shape)
    return Beside(parts[0].name, parts[0].dtype, shape, tuple(merged))
