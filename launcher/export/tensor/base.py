"""A tensor that is not in memory: where its rows come from, a tile of them at a time.

Every source of a consolidation is described by `Tensor`s and every step (cast, merge, slice) wraps
one in another, so that only the rows being written exist. A tensor is seen as a matrix: its last
dim are the columns, all others the rows; a vector has one column.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from launcher.export.tensor.tiles import refuse_overflow, scratch, spans


@dataclass(frozen=True)
class Tensor(ABC):
    """`fill` is the fast way to its rows, `exact` a slow and independent one that checks it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def fill(self, out: torch.Tensor, first: int) -> None:
        """Write rows [first, first + len(out)) into `out`, contiguous [n, columns] of `dtype`."""

    @abstractmethod
    def exact(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) before the last rounding: float64, or `dtype` where it is integer."""

    def settled(self, first: int, last: int) -> torch.Tensor:
        """`exact` rounded to `dtype`, in float64: what a further computation begins with."""
        values = self.exact(first, last)
        return values.to(self.dtype).double() if self.dtype.is_floating_point else values

    @abstractmethod
    def files(self) -> Iterator[Path]:
        """The files that its values are read from, perhaps repeatedly."""

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) as a new tensor [last - first, columns]."""
        out = torch.empty(last - first, self.columns, dtype=self.dtype)
        self.fill(out, first)
        return out

    def whole(self) -> torch.Tensor:
        return self.read(0, self.rows).view(self.shape)

    def called(self, name: str) -> Self:
        return replace(self, name=name)

    def to(self, dtype: torch.dtype) -> Tensor:
        """Its values in `dtype`; itself when it has it, or is no floating-point tensor. What is
        computed rounds once, to the last dtype asked for: such a class overrides this."""
        if self.dtype == dtype or not self.dtype.is_floating_point:
            return self
        return Cast(self.name, dtype, self.shape, self)


@dataclass(frozen=True)
class Rows(Tensor):
    """Rows [begin, …) of another tensor, as many as `shape` needs: one expert of a fused weight."""

    of: Tensor
    begin: int

    def __post_init__(self) -> None:
        assert self.columns == self.of.columns, (self.name, self.shape, self.of.shape)
        assert 0 <= self.begin <= self.of.rows - self.rows, (self.name, self.begin)

    def fill(self, out: torch.Tensor, first: int) -> None:
        self.of.fill(out, self.begin + first)

    def exact(self, first: int, last: int) -> torch.Tensor:
        return self.of.exact(self.begin + first, self.begin + last)

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, of=self.of.to(dtype))

    def files(self) -> Iterator[Path]:
        return self.of.files()


@dataclass(frozen=True)
class Stack(Tensor):
    """Tensors one below the other: experts fused into one weight. Their columns are the same."""

    of: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        assert {part.columns for part in self.of} == {self.columns}, (self.name, self.shape)
        assert sum(part.rows for part in self.of) == self.rows, (self.name, self.shape)

    def fill(self, out: torch.Tensor, first: int) -> None:
        for part, begin, top, bottom in self._within(first, first + len(out)):
            part.fill(out[begin + top - first : begin + bottom - first], top)

    def exact(self, first: int, last: int) -> torch.Tensor:
        return torch.cat([part.exact(top, end) for part, _, top, end in self._within(first, last)])

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, of=tuple(part.to(dtype) for part in self.of))

    def files(self) -> Iterator[Path]:
        return itertools.chain.from_iterable(part.files() for part in self.of)

    def _within(self, first: int, last: int) -> Iterator[tuple[Tensor, int, int, int]]:
        """Part, its first row here, and the rows of its own that lie in [first, last)."""
        begin = 0
        for part in self.of:
            top, bottom = max(first - begin, 0), min(last - begin, part.rows)
            if top < bottom:
                yield part, begin, top, bottom
            begin += part.rows


@dataclass(frozen=True)
class Cast(Tensor):
    """Another tensor's values rounded to `dtype`. A finite value that becomes infinite is refused,
    and so is a NaN."""

    of: Tensor

    def fill(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            with scratch(self.of.dtype, bottom - top, self.columns) as values:
                self.of.fill(values, first + top)
                out[top:bottom].copy_(values)
                refuse_overflow(self.name, values, out[top:bottom])

    def exact(self, first: int, last: int) -> torch.Tensor:
        return self.of.exact(first, last)

    def to(self, dtype: torch.dtype) -> Tensor:
        return self if dtype == self.dtype else self.of.to(dtype)

    def files(self) -> Iterator[Path]:
        return self.of.files()


@dataclass(frozen=True, eq=False)
class Held(Tensor):
    """A tensor in memory: a scalar, a vector, or what cannot be read in parts."""

    values: torch.Tensor
    origin: Path

    def fill(self, out: torch.Tensor, first: int) -> None:
        out.copy_(self._matrix(first, first + len(out)))

    def exact(self, first: int, last: int) -> torch.Tensor:
        part = self._matrix(first, last)
        return part.double() if self.dtype.is_floating_point else part

    def files(self) -> Iterator[Path]:
        yield self.origin

    def _matrix(self, first: int, last: int) -> torch.Tensor:
        return self.values.reshape(self.rows, self.columns)[first:last]


def held(name: str, values: torch.Tensor, origin: Path) -> Held:
    return Held(name, values.dtype, tuple(values.shape), values, origin)
