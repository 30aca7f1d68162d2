"""Weights quantized again: numbers and scales for other values, laid out like those of the base.

A scale is the largest magnitude of its block over the largest number. FP8 whose scales are named
`_scale_inv` gets the bits of transformers' `Fp8Quantize`. MXFP4's scale is that quotient rounded up
to a power of two, as in triton_kernels' `downcast_to_mxfp`. A scale of bytes is an exponent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.export.merge.row_cache import LIMIT_BYTES, cached
from launcher.export.quantized.packed import (
    E2M1,
    UnpackedFloats,
    UnpackedIntegers,
    pack_floats,
    pack_integers,
)
from launcher.export.quantized.scaled import Grid, ScaledWeight, over_blocks
from launcher.io.tensor import Tensor
from launcher.io.tensor.tiles import MIN_TILE_ROWS, SPAN_ELEMENTS, spans

SPAN_BLOCK_ELEMENTS = 1 << 20  # of blocks side by side that are kept until they are divided
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
        last = first + len(out)
        known = _known_magnitudes(self.source, self.layout)
        largest = None if known is None else known[first:last]
        if largest is None or largest.isnan().any():
            largest = magnitudes(self.source, self.layout, first, last)
        out.copy_(self.layout.scales(largest))

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
        last, height = first + len(out), self.layout.grid.block[0]
        if height * self.source.columns > SPAN_BLOCK_ELEMENTS:
            self._read_large_blocks(out, first)
            return
        for rows, blocks in _block_spans(self.layout.grid, first, last, self.source.columns):
            values = self.source.read(*rows).float()
            largest = _largest(values, self.layout.grid.block[1])
            if height > 1:
                index = self.layout.grid.rows_of(*rows) - blocks[0]
                each = torch.zeros(blocks[1] - blocks[0], largest.shape[1])
                each.scatter_reduce_(0, index[:, None].expand_as(largest), largest, "amax")
                largest = each.index_select(0, index)
            else:
                each = largest
            if (known := _known_magnitudes(self.source, self.layout)) is not None:
                known[slice(*blocks)] = each
            begin, end = max(first, rows[0]), min(last, rows[1])
            inside = slice(begin - rows[0], end - rows[0])
            values = values[inside]
            self.layout.divide(values, largest[inside])
            out[begin - first : end - first].copy_(_pack(values, self.layout))

    def _read_large_blocks(self, out: torch.Tensor, first: int) -> None:
        """Read the source twice: for the magnitudes of whole blocks, and for the numbers."""
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
        rows = grid.rows_of(first, first + len(values))
        begin, end = int(rows[0]), int(rows[-1]) + 1
        known = _known_magnitudes(self.source, self.layout)
        if known is None:
            return magnitudes(self.source, self.layout, begin, end).index_select(0, rows - begin)
        if known[begin:end].isnan().any():
            known[begin:end] = magnitudes(self.source, self.layout, begin, end)
        return known.index_select(0, rows)


def _known_magnitudes(source: Tensor, layout: Layout) -> torch.Tensor | None:
    """The largest magnitudes of all blocks as far as a thread has read them, NaN elsewhere: fp32
    [grid rows, grid columns], filled by those who compute them. None if they are too many.

    The numbers of a file come before their scales, which need not be computed a second time.
    """
    shape = layout.grid.values.rows, layout.grid.values.columns
    if shape[0] * shape[1] * torch.float32.itemsize > LIMIT_BYTES:
        return None
    return cached(source, "magnitudes of blocks", lambda: torch.full(shape, torch.nan))


def _block_spans(
    grid: Grid, first: int, last: int, columns: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of rows of the matrices that contain [first, last), in whole blocks, and the rows of
    the grid in each. Each has at least MIN_TILE_ROWS rows unless the blocks have fewer."""
    top, bottom = (int(row) for row in grid.rows_of(first, last)[[0, -1]])
    height = grid.block[0]
    step = max(-(-MIN_TILE_ROWS // height), SPAN_ELEMENTS // (columns * height))
    starts = list(range(top, bottom + 1, step))
    end_of_rows = _source_rows(grid, top, bottom + 1)[1]
    if (
        len(starts) > 1
        and end_of_rows - _source_rows(grid, starts[-1], bottom + 1)[0] < MIN_TILE_ROWS
    ):
        starts.pop()
    for begin, end in zip(starts, [*starts[1:], bottom + 1], strict=True):
        yield _source_rows(grid, begin, end), (begin, end)


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
        return pack_floats(values).view(numbers.packed.dtype)
    if isinstance(numbers, UnpackedIntegers):
        return pack_integers(values, numbers.bits, numbers.packed.columns)
    if numbers.dtype == torch.int8:
        return values.round_().clamp_(-128, 127).to(torch.int8)
    return values.clamp_(-layout.largest, layout.largest).to(numbers.dtype)
