"""Tensors that are read a part at a time: from a file, with something added, or quantised."""

from __future__ import annotations

from typing import Protocol

import torch
from safetensors import safe_open

from launcher.boxes import boxes


class Stored(Protocol):
    """A tensor of which each rank reads what it keeps."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The box of `shape` at `offsets`."""


class InFile:
    """A tensor of an open safetensors file."""

    def __init__(self, file: safe_open, name: str, tally: list[int]) -> None:
        """`tally[0]` counts the bytes that were read."""
        self._file, self._name, self._tally = file, name, tally

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._file.get_slice(self._name).get_shape())

    @property
    def dtype(self) -> torch.dtype:
        return self._box((slice(0),) if self.shape else ()).dtype

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Only the bytes of the box are read when it is a range of rows."""
        box = self._box(_slices(offsets, shape))
        self._tally[0] += box.nbytes
        return box

    def _box(self, box: tuple[slice, ...]) -> torch.Tensor:
        found: torch.Tensor = (
            self._file.get_slice(self._name)[box] if box else self._file.get_tensor(self._name)
        )
        return found


class Sum:
    """A matrix [m, n] with left [m, r] @ right [r, n] added, in fp32: the reader rounds once."""

    dtype = torch.float32

    def __init__(self, of: Stored, left: torch.Tensor, right: torch.Tensor) -> None:
        self._of, self._left, self._right = of, left, right

    @property
    def shape(self) -> torch.Size:
        return self._of.shape

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        rows, columns = _slices(offsets, shape)
        before = self._of.read(offsets, shape).float()
        return before + self._left[rows] @ self._right[:, columns]


def read_whole(stored: Stored) -> torch.Tensor:
    shape = tuple(stored.shape)
    return stored.read((0,) * len(shape), shape)


def read_run(stored: Stored, begin: int, count: int) -> torch.Tensor:
    """Elements [begin, begin + count) of the flattened tensor, 1-d; nothing else is read but the
    rest of the rows where the run begins and ends."""
    found = boxes(begin, count, tuple(stored.shape))
    parts = [stored.read(offsets, sizes).flatten() for offsets, sizes in found]
    return torch.cat(parts) if parts else torch.empty(0, dtype=stored.dtype)


def _slices(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(offsets, shape, strict=True))
