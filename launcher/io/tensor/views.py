"""Slicing, concatenating, reshaping and transposing lazy tensors.

A slice of a slice, and a concatenation of adjacent slices, are simplified: cutting a tensor and
joining the parts again returns the original tensor.
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
from launcher.io.tensor.base import ConcatRows, RowSlice, Tensor
from launcher.io.tensor.layouts import ColumnSlice, ConcatColumns, Reshaped, Transposed
from launcher.io.tensor.stored import Stored

MAX_MATRIX_BYTES = 128 << 20  # a transposed tensor keeps one such matrix in memory for each thread
MAX_PARTS = 1 << 16  # of one concatenation; each part is an object of about 300 bytes

_thread_cache = threading.local()


def concat(parts: Sequence[Tensor], dim: int, shape: tuple[int, ...]) -> Tensor:
    """`parts` concatenated along `dim`, as a tensor of `shape`.

    Raises UserError if this needs so many slices that memory would grow with the model.
    """
    dim %= len(shape)
    if len(shape) > 1 and dim == len(shape) - 1:
        return parts[0] if len(parts) == 1 else _concat_columns(parts, shape)
    outer = math.prod(shape[:dim])
    slices = itertools.chain.from_iterable(
        _slices(part, i * (part.rows // outer), part.rows // outer)
        for i in range(outer)
        for part in parts
    )
    return _concat_rows(slices, parts[0], shape)


def narrow(tensor: Tensor, dim: int, first: int, size: int, shape: tuple[int, ...]) -> Tensor:
    """Indices [first, first + size) of `dim`, as a tensor of `shape`."""
    dims = tensor.shape
    dim %= len(dims)
    if len(dims) > 1 and dim == len(dims) - 1:
        part = tensor if size == dims[-1] else _column_slice(tensor, first, size)
        return reshape(part, shape)
    inner = math.prod(dims[dim + 1 : -1]) if dim < len(dims) - 1 else 1
    slices = itertools.chain.from_iterable(
        _slices(tensor, (i * dims[dim] + first) * inner, size * inner)
        for i in range(math.prod(dims[:dim]))
    )
    return _concat_rows(slices, tensor, shape)


def transpose(tensor: Tensor, dim0: int, dim1: int) -> Tensor:
    """`tensor` with two dims exchanged.

    Raises UserError if a matrix is larger than MAX_MATRIX_BYTES, and for the last dim and one that
    is not next to it.
    """
    dims = tensor.shape
    dim0, dim1 = sorted((dim0 % len(dims), dim1 % len(dims)))
    order = list(range(len(dims)))
    order[dim0], order[dim1] = dim1, dim0
    shape = tuple(dims[i] for i in order)
    if dim0 == dim1:
        return tensor
    if dim1 < len(dims) - 1:
        leading = torch.arange(math.prod(dims[:-1])).view(dims[:-1])
        rows = leading.permute(order[:-1]).reshape(-1).tolist()
        return _concat_rows((p for row in rows for p in _slices(tensor, row, 1)), tensor, shape)
    if dim0 != len(dims) - 2:
        raise UserError(
            f"{tensor.name}: dims {dim0} and {dim1} of {list(dims)} cannot be exchanged tile by "
            f"tile; save the checkpoint under its names on disk with save_pretrained"
        )
    if isinstance(tensor, Transposed):
        return tensor.source
    if dims[-1] * dims[-2] * tensor.dtype.itemsize > MAX_MATRIX_BYTES:
        raise UserError(
            f"{tensor.name} {list(dims)} must be transposed, and one of its matrices is larger "
            f"than {MAX_MATRIX_BYTES >> 20} MiB; save the checkpoint with save_pretrained instead"
        )
    return Transposed(tensor.name, tensor.dtype, shape, tensor)


def reshape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same elements in the same order, as a tensor of `shape`."""
    if tensor.shape == shape:
        return tensor
    if (shape[-1] if len(shape) > 1 else 1) == tensor.columns:
        if isinstance(tensor, Stored | RowSlice | ConcatRows):
            return replace(tensor, shape=shape)
        return RowSlice(tensor.name, tensor.dtype, shape, tensor, 0)
    if isinstance(tensor, Reshaped) and tensor.source.shape == shape:
        return tensor.source
    return Reshaped(tensor.name, tensor.dtype, shape, tensor)


def _slices(tensor: Tensor, begin: int, count: int) -> Iterator[Tensor]:
    """Rows [begin, begin + count), as slices of the tensors that `tensor` itself is made from."""
    if not count:
        return
    if begin == 0 and count == tensor.rows and not isinstance(tensor, ConcatRows | RowSlice):
        yield tensor
    elif isinstance(tensor, RowSlice):
        yield from _slices(tensor.source, tensor.begin + begin, count)
    elif isinstance(tensor, ConcatRows):
        starts = _part_starts(tensor)
        for i in range(bisect_right(starts, begin) - 1, bisect_left(starts, begin + count)):
            part, start = tensor.parts[i], starts[i]
            top, bottom = max(begin - start, 0), min(begin + count - start, part.rows)
            yield from _slices(part, top, bottom - top)
    else:
        shape = (count, tensor.columns) if len(tensor.shape) > 1 else (count,)
        yield RowSlice(tensor.name, tensor.dtype, shape, tensor, begin)


def _part_starts(tensor: ConcatRows) -> list[int]:
    """The first row of each part. The result for the latest tensor is cached: a tensor of hundreds
    of experts is asked for once for each expert."""
    cached: tuple[ConcatRows, list[int]] | None = getattr(_thread_cache, "starts", None)
    if cached is None or cached[0] is not tensor:
        counts = [part.rows for part in tensor.parts]
        starts = [0, *itertools.accumulate(counts[:-1])]
        _thread_cache.starts = cached = (tensor, starts)
    return cached[1]


def _concat_rows(slices: Iterator[Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`slices` one below the other, with adjacent ones merged. `like` gives name and dtype."""
    parts: list[Tensor] = []
    for part in slices:
        previous = parts[-1] if parts else None
        if (
            isinstance(part, RowSlice)
            and isinstance(previous, RowSlice)
            and previous.source is part.source
            and previous.begin + previous.rows == part.begin
        ):
            parts.pop()
            parts.extend(_slices(part.source, previous.begin, previous.rows + part.rows))
        else:
            parts.append(part)
        if len(parts) > MAX_PARTS:
            raise UserError(
                f"{like.name}: its conversion needs more than {MAX_PARTS:,} slices; save the "
                f"checkpoint under its names on disk with save_pretrained"
            )
    if len(parts) == 1:
        return reshape(parts[0], shape)
    return ConcatRows(like.name, like.dtype, shape, tuple(parts))


def _column_slice(tensor: Tensor, begin: int, count: int) -> Tensor:
    if isinstance(tensor, ColumnSlice):
        return _column_slice(tensor.source, tensor.begin + begin, count)
    shape = (*tensor.shape[:-1], count)
    return ColumnSlice(tensor.name, tensor.dtype, shape, tensor, begin)


def _concat_columns(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """`parts` side by side, with adjacent slices merged."""
    merged: list[Tensor] = []
    for part in parts:
        previous = merged[-1] if merged else None
        if (
            isinstance(part, ColumnSlice)
            and isinstance(previous, ColumnSlice)
            and previous.source is part.source
            and previous.begin + previous.columns == part.begin
        ):
            count = previous.columns + part.columns
            is_all = count == part.source.columns
            merged[-1] = (
                part.source if is_all else _column_slice(part.source, previous.begin, count)
            )
        else:
            merged.append(part)
    if len(merged) == 1:
        return reshape(merged[0], shape)
    return ConcatColumns(parts[0].name, parts[0].dtype, shape, tuple(merged))
