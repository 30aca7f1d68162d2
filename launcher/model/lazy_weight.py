"""Weights that are read a part at a time: from a file, or with a low-rank sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors import safe_open

from launcher.io.weight_views import LazyWeight

# Calls its second argument with (begin, count) for a part of as many items as its first one says,
# and returns the values of all items in order. Ranks that share the work compute a part each.
InParts = Callable[[int, Callable[[int, int], torch.Tensor]], torch.Tensor]


def alone(count: int, compute: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """An `InParts` of one process."""
    return compute(0, count)


class FileWeight:
    """A tensor of a safetensors file."""

    def __init__(
        self,
        open_file: Callable[[], safe_open],
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        bytes_read: list[int],
    ) -> None:
        """`bytes_read[0]` is increased by the bytes of each read."""
        self.shape, self.dtype = torch.Size(shape), dtype
        self._open_file, self._name, self._bytes_read = open_file, name, bytes_read

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The box of `shape` at `offsets`. If it is a range of rows, only its bytes are read."""
        file, slices = self._open_file(), _slices(offsets, shape)
        box: torch.Tensor = (
            file.get_slice(self._name)[slices] if slices else file.get_tensor(self._name)
        )
        self._bytes_read[0] += box.nbytes
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


def _slices(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, shape, strict=True))
