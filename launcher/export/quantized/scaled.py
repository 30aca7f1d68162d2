"""Weights that are stored as small numbers and scales: FP8, INT8, INT4 and MXFP4.

A matrix is divided into blocks of equal size, and each block has one scale: the whole matrix (per
tensor), a row (per channel), a part of a row (per group), or a rectangle. The weight is
(number - zero point) · scale, with the rounding of the libraries that wrote it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from launcher.io.tensor import Tensor
from launcher.io.tensor.tiles import refuse_overflow, scratch, spans

E8M0_BIAS = 127  # a power of two as one byte (OCP Microscaling Formats, section 5.4.1)


@dataclass(frozen=True)
class Grid:
    """One value (a scale or a zero point) for each block of the matrices [..., height, columns].

    `values`: [..., grid rows, grid columns], in any dtype; bytes are exponents of two.
    """

    values: Tensor
    height: int  # rows of one matrix
    block: tuple[int, int]  # rows and columns of a block

    def read(self, first: int, last: int) -> torch.Tensor:
        """The values for rows [first, last) of the matrices, fp32 [last - first, grid columns]."""
        index = self.rows_of(first, last)
        begin, end = int(index[0]), int(index[-1]) + 1
        stored = self.values.read(begin, end)
        if stored.dtype == torch.uint8:
            stored = stored.view(torch.float8_e8m0fnu)
        return stored.float().index_select(0, index - begin)

    def reference(self, first: int, last: int, columns: int) -> torch.Tensor:
        """The value for each element of the rows, float64 [last - first, columns]."""
        index = self.rows_of(first, last)
        begin, end = int(index[0]), int(index[-1]) + 1
        stored = self.values.reference(begin, end).double()
        if self.values.dtype == torch.uint8:
            stored = 2.0 ** (stored - E8M0_BIAS)
        return stored[index - begin][:, torch.arange(columns) // self.block[1]]

    def rows_of(self, first: int, last: int) -> torch.Tensor:
        """The row of the grid for each row [first, last) of the matrices."""
        rows, height = torch.arange(first, last), self.block[0]
        return rows // self.height * -(-self.height // height) + rows % self.height // height


@dataclass(frozen=True)
class ScaledWeight(Tensor):
    """(numbers - zeros) · scales, in the shape of `numbers`.

    `product`: the dtype that the product is rounded to before it is rounded to `dtype`. `parts`:
    the tensors of the file that it is made of.
    """

    numbers: Tensor  # float8, an integer or fp32; each value is exact in fp32
    scales: Grid
    zeros: Grid | None
    product: torch.dtype
    parts: tuple[Tensor, ...]

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            begin, end = first + top, first + bottom
            with (
                scratch(self.numbers.dtype, bottom - top, self.columns) as stored,
                scratch(torch.float32, bottom - top, self.columns) as values,
            ):
                self.numbers.read_into(stored, begin)
                _widen(stored, values)
                if self.zeros is not None:
                    over_blocks(values, self.zeros.read(begin, end), self.zeros.block[1], "sub_")
                over_blocks(values, self.scales.read(begin, end), self.scales.block[1], "mul_")
                exact = self.product == torch.float32
                out[top:bottom].copy_(values if exact else values.to(self.product))
                refuse_overflow(self.name, values, out[top:bottom])

    def reference(self, first: int, last: int) -> torch.Tensor:
        numbers = self.numbers.reference(first, last).double()
        if self.zeros is not None:
            numbers = numbers - self.zeros.reference(first, last, self.columns)
        values = numbers * self.scales.reference(first, last, self.columns)
        return values.to(self.product).double()

    def to(self, dtype: torch.dtype) -> Tensor:
        return replace(self, dtype=dtype)

    def files(self) -> Iterator[Path]:
        return itertools.chain.from_iterable(part.files() for part in self.parts)


def _widen(stored: torch.Tensor, values: torch.Tensor) -> None:
    """Write the numbers to `values`, in fp32. FP8 is looked up, in a sixth of torch's time."""
    if not (stored.dtype.is_floating_point and stored.dtype.itemsize == 1):
        values.copy_(stored)
        return
    with scratch(torch.int32, *stored.shape) as indices:
        indices.copy_(stored.view(torch.uint8))
        torch.index_select(_table(stored.dtype), 0, indices.view(-1), out=values.view(-1))


@cache
def _table(dtype: torch.dtype) -> torch.Tensor:
    """[256] fp32: the value of each byte."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def over_blocks(values: torch.Tensor, blocks: torch.Tensor, width: int, operation: str) -> None:
    """Apply an in-place operation of torch to `values` [rows, columns] and, for each `width`
    columns, one value of `blocks` [rows, blocks]. The last block may be narrower."""
    full = values.shape[1] // width
    inner = values[:, : full * width].unflatten(1, (full, width))
    getattr(inner, operation)(blocks[:, :full, None])
    if full * width < values.shape[1]:
        getattr(values[:, full * width :], operation)(blocks[:, full:])
