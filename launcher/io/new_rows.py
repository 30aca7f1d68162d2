"""A tensor with rows for new tokens: each is the mean of the rows of the tokens before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from launcher.io.tensor import ConcatRows, RowSlice, Tensor, in_memory

CHUNK_ROWS = 2**14  # of a tensor, in memory while it is read or copied


def with_new_rows(tensor: Tensor, old: list[int], new: list[int], rows: int) -> Tensor:
    """`tensor` [rows before, width] or [rows before], with `rows` rows, of which `new` are the mean
    of `old`."""
    mean = _mean_row(tensor, old)
    parts: list[Tensor] = []
    at = 0
    for first, last in _runs(new):
        if at < first:
            shape = (first - at, *tensor.shape[1:])
            parts.append(RowSlice(tensor.name, tensor.dtype, shape, tensor, at))
        values = mean.expand(last - first, -1).reshape(last - first, *tensor.shape[1:])
        parts.append(in_memory(tensor.name, values, Path()))
        at = last
    if at < rows:
        shape = (rows - at, *tensor.shape[1:])
        parts.append(RowSlice(tensor.name, tensor.dtype, shape, tensor, at))
    shape = (rows, *tensor.shape[1:])
    return ConcatRows(tensor.name, tensor.dtype, shape, tuple(parts))


def _mean_row(tensor: Tensor, rows: list[int]) -> torch.Tensor:
    """The mean of `rows` [1, columns], computed in fp32."""
    total, wanted = torch.zeros(tensor.columns), torch.tensor(rows)
    for first in range(0, tensor.rows, CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, tensor.rows)
        inside = wanted[(wanted >= first) & (wanted < last)] - first
        total += tensor.read(first, last)[inside].float().sum(0)
    return (total / len(rows)).to(tensor.dtype)[None]


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted numbers as ranges [first, last)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs


def chunks(tensor: Tensor) -> Iterator[torch.Tensor]:
    """The values of `tensor`, up to CHUNK_ROWS rows at a time."""
    for first in range(0, tensor.rows, CHUNK_ROWS):
        yield tensor.read(first, min(first + CHUNK_ROWS, tensor.rows))
