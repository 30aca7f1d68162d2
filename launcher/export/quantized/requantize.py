"""Weights quantized again: numbers and scales for other values, laid out like those of the base.

A scale is the largest magnitude of its block over the largest number. FP8 whose scales are named
`_scale_inv` gets the bits of transformers' `Fp8Quantize`. MXFP4's scale is that quotient rounded up
to a power of two, as in triton_kernels' `downcast_to_mxfp`. A scale of bytes is an exponent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.export.merge.row_cache import cached
from launcher.export.quantized.packed import E2M1, WORD_BITS, UnpackedFloats, UnpackedIntegers
from launcher.export.quantized.scaled import Grid, ScaledWeight, over_blocks
from launcher.io.tensor import Tensor
from launcher.io.tensor.tiles import spans

MANTISSA, EXPONENT = 0x007FFFFF, 0x7F800000  # the bits of fp32


@dataclass(frozen=True)
class Layout:
    """How the base stores a weight."""

    like: ScaledWeight

    @property
    def grid(self) -> Grid:
        return self.like.scales

    @property
    def is_inverse(self) -> bool:
        """Whether a scale is rounded as the reciprocal of a factor."""
        return self.grid.values.name.endswith("_scale_inv")

    @cached_property
    def largest(self) -> float:
        """The largest number; for integers half the range, as in compressed-tensors."""
        numbers = self.like.numbers
        if isinstance(numbers, UnpackedFloats):
            return E2M1[-1]
        if isinstance(numbers, UnpackedIntegers):
            return ((1 << numbers.bits) - 1) / 2
        if numbers.dtype == torch.int8:
            return 127.5
        return float(torch.finfo(numbers.dtype).max)

    def scales(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """The scales as they are stored, for the largest magnitudes of blocks (fp32)."""
        positive = torch.where(magnitudes > 0, magnitudes, 1.0)
        scales = 1.0 / (self.largest / positive) if self.is_inverse else positive / self.largest
        scales = torch.where(magnitudes > 0, scales, 1.0)
        dtype = self.grid.values.dtype
        if dtype.itemsize > 1:
            return scales.to(dtype)
        rounded_up = scales.view(torch.int32) + MANTISSA & EXPONENT
        return rounded_up.view(torch.float32).to(torch.float8_e8m0fnu).view(dtype)

    def divide(self, values: torch.Tensor, magnitudes: torch.Tensor) -> None:
        """Divide values [rows, columns] by the scales of their blocks, in place.

        `magnitudes`: the largest of each block of each row, fp32 [rows, grid columns].
        """
        stored, width = self.scales(magnitudes), self.grid.block[1]
        if self.is_inverse and stored.dtype == torch.float32:
            factors = self.largest / torch.where(magnitudes > 0, magnitudes, 1.0)
            over_blocks(values, torch.where(magnitudes > 0, factors, 1.0), width, "mul_")
        else:
            is_exponent = stored.dtype.itemsize == 1
            scales = stored.view(torch.float8_e8m0fnu) if is_exponent else stored
            over_blocks(values, scales.float(), width, "div_")


@dataclass(frozen=True)
class NewScales(Tensor):
    """The scales [..., grid rows, grid columns] of `source` [..., rows, columns]."""

    source: Tensor
    layout: Layout

    def read_into(self, out: torch.Tensor, first: int) -> None:
        out.copy_(self.layout.scales(magnitudes(self.source, self.layout, first, first + len(out))))

    def reference(self, first: int, last: int) -> torch.Tensor:
        """From the values of `source` as they are written: one that is halfway between two values
        of its dtype may be rounded either way."""
        rows = [self._reference_row(row) for row in range(first, last)]
        stored = self.layout.scales(torch.stack(rows))
        return stored.double() if self.dtype.is_floating_point else stored

    def files(self) -> Iterator[Path]:
        return self.source.files()

    def _reference_row(self, row: int) -> torch.Tensor:
        """The largest magnitudes in one row of the grid, one block after the other."""
        top, bottom = _source_rows(self.layout.grid, row, row + 1)
        largest = torch.zeros(self.columns)
        for begin, end in spans(bottom - top, self.source.columns):
            values = self.source.read(top + begin, top + end).float()
            for index, block in enumerate(values.split(self.layout.grid.block[1], dim=1)):
                largest[index] = max(largest[index], block.abs().max())
        return largest


@dataclass(frozen=True)
class NewNumbers(Tensor):
    """The numbers of `source`, packed as those of the base."""

    source: Tensor  # [..., rows, columns]
    layout: Layout

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.source.columns):
            begin, end = first + top, first + bottom
            values = self.source.read(begin, end).float()
            self.layout.divide(values, self._magnitudes(values, begin))
            out[top:bottom].copy_(_pack(values, self.layout))

    def reference(self, first: int, last: int) -> torch.Tensor:
        """The same division, one row after the other, of values that are compared with the slow
        computation of `source`.

        Raises UserError if they differ by more than two units of the largest in the row.
        """
        values, exact = self.source.read(first, last), self.source.reference(first, last)
        unit = torch.finfo(values.dtype).eps * exact.abs().amax(1, keepdim=True)
        if ((values.double() - exact).abs() > 2 * unit).any():
            raise UserError(
                f"{self.name}: rows {first} to {last} differ from a second computation; a source "
                "changed in the meantime, or this machine computes wrong results"
            )
        rows = []
        for row in range(first, last):
            single = values[row - first : row - first + 1].float()
            self.layout.divide(single, self._magnitudes(single, row))
            rows.append(_pack(single, self.layout))
        packed = torch.cat(rows)
        return packed.double() if self.dtype.is_floating_point else packed

    def files(self) -> Iterator[Path]:
        return self.source.files()

    def _magnitudes(self, values: torch.Tensor, first: int) -> torch.Tensor:
        """The largest magnitude of each block for each row: [rows, grid columns]. `values`: the
        rows of `source` from `first`."""
        grid = self.layout.grid
        if grid.block[0] == 1:
            return _largest(values, grid.block[1])
        every = cached(
            self.source,
            "magnitudes of blocks",
            lambda: magnitudes(self.source, self.layout, 0, grid.values.rows),
        )
        return every.index_select(0, grid.rows_of(first, first + len(values)))


def magnitudes(source: Tensor, layout: Layout, first: int, last: int) -> torch.Tensor:
    """The largest magnitudes of the blocks in rows [first, last) of the grid: fp32
    [last - first, grid columns]. Reads a span of `source` at a time."""
    grid = layout.grid
    out = torch.zeros(last - first, grid.values.columns)
    top, bottom = _source_rows(grid, first, last)
    for begin, end in spans(bottom - top, source.columns):
        largest = _largest(source.read(top + begin, top + end).float(), grid.block[1])
        rows = grid.rows_of(top + begin, top + end) - first
        out.scatter_reduce_(0, rows[:, None].expand_as(largest), largest, "amax")
    return out


def _largest(values: torch.Tensor, width: int) -> torch.Tensor:
    """The largest magnitude of each `width` columns of each row."""
    full = values.shape[1] // width
    parts = [values[:, : full * width].unflatten(1, (full, width)).abs().amax(2)]
    if full * width < values.shape[1]:
        parts.append(values[:, full * width :].abs().amax(1, keepdim=True))
    return torch.cat(parts, dim=1)


def _source_rows(grid: Grid, first: int, last: int) -> tuple[int, int]:
    """The rows of the matrices in rows [first, last) of the grid."""
    height, per_matrix = grid.block[0], -(-grid.height // grid.block[0])

    def begin(row: int) -> int:
        matrix, inside = divmod(row, per_matrix)
        return matrix * grid.height + inside * height

    matrix, inside = divmod(last - 1, per_matrix)
    return begin(first), matrix * grid.height + min((inside + 1) * height, grid.height)


def _pack(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Quotients [rows, columns] as the base's numbers; `values` is overwritten."""
    numbers = layout.like.numbers
    if isinstance(numbers, UnpackedFloats):
        return _pack_floats(values).view(numbers.packed.dtype)
    if isinstance(numbers, UnpackedIntegers):
        return _pack_integers(values, numbers.bits, numbers.packed.columns)
    if numbers.dtype == torch.int8:
        return values.round_().clamp_(-128, 127).to(torch.int8)
    return values.clamp_(-layout.largest, layout.largest).to(numbers.dtype)


def _pack_integers(values: torch.Tensor, bits: int, words: int) -> torch.Tensor:
    """int32 [rows, words]."""
    offset, count = 1 << bits - 1, WORD_BITS // bits
    integers = torch.zeros(len(values), words * count, dtype=torch.int32)
    integers[:, : values.shape[1]] = values.round_().clamp_(-offset, offset - 1) + offset
    shifts = torch.arange(count, dtype=torch.int32) * bits
    packed: torch.Tensor = integers.unflatten(1, (words, count)) << shifts
    return packed.sum(2, dtype=torch.int32)


def _pack_floats(values: torch.Tensor) -> torch.Tensor:
    """Bytes [rows, columns / 2]; halfway between two numbers, the even code is taken."""
    sizes = values.abs()
    codes = values.signbit().to(torch.uint8) << 3
    for below, above in itertools.pairwise(range(len(E2M1))):
        halfway = (E2M1[below] + E2M1[above]) / 2
        codes += sizes > halfway if below % 2 == 0 else sizes >= halfway
    low, high = codes.unflatten(1, (-1, 2)).unbind(2)
    packed: torch.Tensor = low + (high << 4)
    return packed
