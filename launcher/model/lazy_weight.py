"""Weights that are read a part at a time: from a file, or with a low-rank sum."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from launcher.errors import UserError
from launcher.folders import regular
from launcher.io.boxes import runs
from launcher.io.weight_views import LazyWeight, Placed

TILE_BYTES = 2**25  # of a tensor, in memory while it is cast or moved

# Calls its second argument with (begin, count) for a part of as many items as its first one says,
# and returns the values of all items in order. Ranks that share the work compute a part each.
InParts = Callable[[int, Callable[[int, int], torch.Tensor]], torch.Tensor]


def alone(count: int, compute: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """An `InParts` of one process."""
    return compute(0, count)


class TensorFile:
    """A file of tensors, read by position. It counts the bytes.

    Pages of a mapped file are read with their neighbors, so that a rank that keeps an eighth of
    every expert would read all of them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes_read = path, 0
        self._file: BinaryIO | None = None

    def read_into(self, out: memoryview, begin: int) -> None:
        """Fill `out` with the bytes from `begin`. Raises UserError if the file ends before."""
        if self._file is None:
            self._file = regular.open_file(self.path)
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing ahead
        at = 0
        while at < len(out):
            count = os.preadv(self._file.fileno(), [out[at:]], begin + at)
            if count == 0:
                raise UserError(f"{self.path} ends before byte {begin + at}: it was truncated")
            at += count
        self.bytes_read += len(out)


class FileWeight(Placed):
    """A tensor of a safetensors file."""

    def __init__(
        self, file: TensorFile, begin: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """`begin`: the first byte in the file."""
        self.shape, self.dtype = torch.Size(shape), dtype
        self._file, self._begin = file, begin

    def read_into(self, out: torch.Tensor, offsets: tuple[int, ...]) -> None:
        """Write the box of `out`'s shape at `offsets` to `out`. Only its bytes are read, straight
        into their place if dtype, device and layout are those of the file, otherwise in tiles."""
        if out.dtype == self.dtype and out.device.type == "cpu" and out.is_contiguous():
            self._fill(out, offsets)
            return
        dim = next((dim for dim, size in enumerate(out.shape) if size > 1), None)
        rows = 1 if dim is None else max(1, TILE_BYTES * out.shape[dim] // out.nbytes)
        tiles = (out,) if dim is None else out.split(rows, dim)
        for index, tile in enumerate(tiles):
            place = tuple(o + index * rows * (axis == dim) for axis, o in enumerate(offsets))
            values = torch.empty(tile.shape, dtype=self.dtype)
            self._fill(values, place)
            tile.copy_(values.to(out.device))  # moved first and cast there

    def _fill(self, out: torch.Tensor, offsets: tuple[int, ...]) -> None:
        data = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        at = 0
        for first, (_, sizes) in runs((offsets, tuple(out.shape)), tuple(self.shape)):
            count = math.prod(sizes) * self.dtype.itemsize
            self._file.read_into(data[at : at + count], self._begin + first * self.dtype.itemsize)
            at += count


class WeightSum:
    """The matrix base [m, n] + left [m, r] @ right [r, n] in fp32, so the caller rounds only
    once."""

    dtype = torch.float32

    def __init__(self, base: LazyWeight, left: torch.Tensor, right: torch.Tensor) -> None:
        self._base, self._left, self._right = base, left, right

    @property
    def shape(self) -> torch.Size:
        return self._base.shape

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        rows, columns = _slices(offsets, shape)
        base = self._base.read(offsets, shape).float()
        return base + self._left[rows] @ self._right[:, columns]


def _slices(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, shape, strict=True))
