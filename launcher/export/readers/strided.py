"""A view of a storage in a file that is not contiguous: transposed, or every other column."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from launcher.export.tensor import Tensor
from launcher.export.tensor.disk import read_into
from launcher.export.tensor.stored import as_bytes
from launcher.export.tensor.tiles import SPAN


@dataclass(frozen=True)
class Strided(Tensor):
    """Element (i, j, …) lies at byte `begin` + (i·strides[0] + j·strides[1] + …)·itemsize."""

    file: Path
    begin: int
    strides: tuple[int, ...]  # elements, one a dim

    def fill(self, out: torch.Tensor, first: int) -> None:
        height = self.shape[-2] if len(self.shape) > 1 else self.rows
        at = 0
        while at < len(out):  # the rows of one innermost matrix at a time
            outer, row = divmod(first + at, height)
            count = min(height - row, len(out) - at)
            self._fill_within(out[at : at + count], self._outer(outer), row)
            at += count

    def exact(self, first: int, last: int) -> torch.Tensor:
        """Through a memory map that numpy lays the strides over."""
        whole = numpy.memmap(self.file, numpy.uint8, "r")
        width = self.dtype.itemsize
        cells: numpy.ndarray = numpy.ndarray(
            (*self.shape, width),
            numpy.uint8,
            whole.data,
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

    def _outer(self, index: int) -> int:
        """Elements before the `index`-th innermost matrix."""
        at = 0
        for size, stride in zip(self.shape[:-2][::-1], self.strides[:-2][::-1], strict=True):
            index, inside = divmod(index, size)
            at += inside * stride
        return at

    def _fill_within(self, out: torch.Tensor, base: int, row: int) -> None:
        down, across = self.strides[-2:] if len(self.shape) > 1 else (1, self.strides[0])
        if len(self.shape) == 1:
            out, row = out.t(), row * across
        base += row * down
        if len(self.shape) > 1 and down < across:  # what lies together is a column
            out, down, across = out.t(), across, down
        for line in range(len(out)):
            self._fill_line(out[line], base + line * down, across)

    def _fill_line(self, out: torch.Tensor, at: int, stride: int) -> None:
        """Elements `at`, `at` + `stride`, …; what lies between them is read too."""
        step = max(1, SPAN // max(1, stride))
        for first in range(0, len(out), step):
            part = out[first : first + step]
            data = torch.empty((len(part) - 1) * stride + 1, dtype=self.dtype)
            begin = self.begin + (at + first * stride) * self.dtype.itemsize
            read_into(as_bytes(data), self.file, begin, self.name)
            part.copy_(data.as_strided(part.shape, (stride,)))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie in the order of the shape, without holes."""
    expected = 1
    for size, stride in zip(shape[::-1], strides[::-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to behind the last."""
    if not math.prod(shape):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
