"""Weights that are read a part at a time: from a file, with a low-rank sum, or quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from safetensors import safe_open

from launcher.io.boxes import boxes

# Calls its second argument with (begin, count) for a part of as many items as its first one says,
# and returns the values of all items in order. Ranks that share the work compute a part each.
InParts = Callable[[int, Callable[[int, int], torch.Tensor]], torch.Tensor]


def alone(count: int, compute: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """An `InParts` of one process."""
    return compute(0, count)


class LazyWeight(Protocol):
    """A tensor of which each rank reads only the part that it keeps."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The box of `shape` at `offsets`."""


class FileWeight:
    """A tensor of an open safetensors file."""

    def __init__(self, file: safe_open, name: str, bytes_read: list[int]) -> None:
        """`bytes_read[0]` is increased by the bytes of each read."""
        self._file, self._name, self._bytes_read = file, name, bytes_read

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._file.get_slice(self._name).get_shape())

    @property
    def dtype(self) -> torch.dtype:
        return self._read((slice(0),) if self.shape else ()).dtype

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The box of `shape` at `offsets`. If it is a range of rows, only its bytes are read."""
        box = self._read(_slices(offsets, shape))
        self._bytes_read[0] += box.nbytes
        return box

    def _read(self, slices: tuple[slice, ...]) -> torch.Tensor:
        box: torch.Tensor = (
            self._file.get_slice(self._name)[slices]
            if slices
            else self._file.get_tensor(self._name)
        )
        return box


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


def read_full(weight: LazyWeight) -> torch.Tensor:
    """The complete tensor."""
    shape = tuple(weight.shape)
    return weight.read((0,) * len(shape), shape)


def read_flat_range(weight: LazyWeight, begin: int, count: int) -> torch.Tensor:
    """Elements [begin, begin + count) of the flattened tensor, 1-d.

    Of the rest of the tensor, only the rows in which the range begins and ends are read.
    """
    found = boxes(begin, count, tuple(weight.shape))
    parts = [weight.read(offsets, sizes).flatten() for offsets, sizes in found]
    return torch.cat(parts) if parts else torch.empty(0, dtype=weight.dtype)


def _slices(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, shape, strict=True))
