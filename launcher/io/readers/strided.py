"""A non-contiguous view of a storage in a file: transposed, or every other column."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from launcher.io.tensor import Tensor
from launcher.io.tensor.disk import read_into
from launcher.io.tensor.stored import as_bytes
from launcher.io.tensor.tiles import SPAN_ELEMENTS


@dataclass(frozen=True)
class Strided(Tensor):
    """Element (i, j, …) is at byte `begin` + (i·strides[0] + j·strides[1] + …)·itemsize."""

    file: Path
    begin: int
    strides: tuple[int, ...]  # in elements, one for each dim

    def read_into(self, out: torch.Tensor, first: int) -> None:
        height = self.shape[-2] if len(self.shape) > 1 else self.rows
        at = 0
        while at < len(out):  # the rows of one innermost matrix at a time
            matrix, row = divmod(first + at, height)
            count = min(height - row, len(out) - at)
            self._read_rows(out[at : at + count], self._matrix_offset(matrix), row)
            at += count

    def reference(self, first: int, last: int) -> torch.Tensor:
        """Reads through a memory map to which numpy applies the strides."""
        mapped = numpy.memmap(self.file, numpy.uint8, "r")
        width = self.dtype.itemsize
        cells: numpy.ndarray = numpy.ndarray(
            (*self.shape, width),
            numpy.uint8,
            mapped.data,
            self.begin,
            (*(stride * width for stride in self.strides), 1),
        )
        rows = range(first, last)
        lead = self.shape[:-1] if len(self.shape) > 1 else self.shape
        copied = numpy.stack([cells[numpy.unravel_index(row, lead)] for row in rows])
        out = torch.from_numpy(copied.reshape(-1)).view(self.dtype).view(len(rows), self.columns)
        return out.double() if self.dtype.is_floating_point else out

    def files(self) -> Iterator[Path]:
        yield self.file

    def _matrix_offset(self, index: int) -> int:
        """The number of elements before the innermost matrix `index`."""
        offset = 0
        for size, stride in zip(self.shape[:-2][::-1], self.strides[:-2][::-1], strict=True):
            index, inside = divmod(index, size)
            offset += inside * stride
        return offset

    def _read_rows(self, out: torch.Tensor, base: int, row: int) -> None:
        """Rows [row, row + len(out)) of the matrix that starts at element `base`."""
        down, across = self.strides[-2:] if len(self.shape) > 1 else (1, self.strides[0])
        if len(self.shape) == 1:
            out, row = out.t(), row * across
        base += row * down
        if len(self.shape) > 1 and down < across:  # columns are closer to contiguous than rows
            out, down, across = out.t(), across, down
        for line in range(len(out)):
            self._read_line(out[line], base + line * down, across)

    def _read_line(self, out: torch.Tensor, at: int, stride: int) -> None:
        """Elements `at`, `at` + `stride`, …; the elements between them are read too."""
        step = max(1, SPAN_ELEMENTS // max(1, stride))
        for first in range(0, len(out), step):
            part = out[first : first + step]
            data = torch.empty((len(part) - 1) * stride + 1, dtype=self.dtype)
            begin = self.begin + (at + first * stride) * self.dtype.itemsize
            read_into(as_bytes(data), self.file, begin, self.name)
            part.copy_(data.as_strided(part.shape, (stride,)))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements are in row-major order without gaps."""
    expected = 1
    for size, stride in zip(shape[::-1], strides[::-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of storage elements from the first element to the last, inclusive."""
    if not math.prod(shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
