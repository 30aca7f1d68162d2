"""The base class of lazy tensors, and the ones that slice, concatenate and cast rows.

A `Tensor` describes where values come from. Each step of a consolidation (cast, merge, slice) wraps
one `Tensor` in another, so that only the rows that are being written are in memory. A tensor is
treated as a matrix: its last dim gives the columns, all other dims the rows. A vector has one
column.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch

from launcher.io.tensor.tiles import refuse_overflow, scratch, spans

# Floating-point dtypes whose values mean nothing alone: the scales of blocks, packed pairs.
NOT_CAST = (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)


def is_castable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype not in NOT_CAST


@dataclass(frozen=True)
class Tensor(ABC):
    """A tensor whose rows are read on demand.

    `read_into` is the fast way to read rows. `reference` is a slow, independent implementation that
    verification compares it with.
    """

    refuses_overflow: ClassVar[bool] = False  # whether `read_into` calls tiles.refuse_overflow

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
    def read_into(self, out: torch.Tensor, first: int) -> None:
        """Write rows [first, first + len(out)) to `out`, a contiguous [n, columns] of `dtype`."""

    @abstractmethod
    def reference(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) before the final rounding: float64, or `dtype` if it is an integer
        type."""

    def rounded_reference(self, first: int, last: int) -> torch.Tensor:
        """`reference` rounded to `dtype`, as float64: the input of a further computation."""
        values = self.reference(first, last)
        return values.to(self.dtype).double() if self.dtype.is_floating_point else values

    @abstractmethod
    def files(self) -> Iterator[Path]:
        """The files that the values are read from. A file can occur several times."""

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) as a new tensor [last - first, columns]."""
        out = torch.empty(last - first, self.columns, dtype=self.dtype)
        self.read_into(out, first)
        return out

    def read_all(self) -> torch.Tensor:
        """All values as a new tensor of `shape`."""
        return self.read(0, self.rows).view(self.shape)

    def renamed(self, name: str) -> Self:
        """The same tensor under another name."""
        return replace(self, name=name)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The values in `dtype`. Returns `self` if it has that dtype or is not castable.

        A computed tensor is rounded only once, to the last dtype that was requested: its class
        overrides this method.
        """
        if self.dtype == dtype or not is_castable(self.dtype):
            return self
        return Cast(self.name, dtype, self.shape, self)


@dataclass(frozen=True)
class RowSlice(Tensor):
    """Rows [begin, …) of `source`, as many as `shape` needs: one expert of a fused weight."""

    source: Tensor
    begin: int

    def __post_init__(self) -> None:
        assert self.columns == self.source.columns, (self.name, self.shape, self.source.shape)
        assert 0 <= self.begin <= self.source.rows - self.rows, (self.name, self.begin)

    def read_into(self, out: torch.Tensor, first: int) -> None:
        self.source.read_into(out, self.begin + first)

    def reference(self, first: int, last: int) -> torch.Tensor:
        return self.source.reference(self.begin + first, self.begin + last)

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.dtype or not is_castable(self.dtype):
            return self
        return replace(self, dtype=dtype, source=self.source.to(dtype))

    def files(self) -> Iterator[Path]:
        return self.source.files()


@dataclass(frozen=True)
class ConcatRows(Tensor):
    """Tensors with the same number of columns, one below the other: experts fused into one
    weight."""

    parts: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        assert {part.columns for part in self.parts} == {self.columns}, (self.name, self.shape)
        assert sum(part.rows for part in self.parts) == self.rows, (self.name, self.shape)

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for part, begin, top, bottom in self._overlapping(first, first + len(out)):
            part.read_into(out[begin + top - first : begin + bottom - first], top)

    def reference(self, first: int, last: int) -> torch.Tensor:
        overlapping = self._overlapping(first, last)
        return torch.cat([part.reference(top, bottom) for part, _, top, bottom in overlapping])

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.dtype or not is_castable(self.dtype):
            return self
        return replace(self, dtype=dtype, parts=tuple(part.to(dtype) for part in self.parts))

    def files(self) -> Iterator[Path]:
        return itertools.chain.from_iterable(part.files() for part in self.parts)

    def _overlapping(self, first: int, last: int) -> Iterator[tuple[Tensor, int, int, int]]:
        """Each part that overlaps [first, last): the part, its first row in this tensor, and which
        of its own rows [top, bottom) overlap."""
        begin = 0
        for part in self.parts:
            top, bottom = max(first - begin, 0), min(last - begin, part.rows)
            if top < bottom:
                yield part, begin, top, bottom
            begin += part.rows


@dataclass(frozen=True)
class Cast(Tensor):
    """The values of `source` rounded to `dtype`.

    Reading raises UserError if a finite value becomes infinite, and if there is a NaN.
    """

    refuses_overflow: ClassVar[bool] = True

    source: Tensor

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            with scratch(self.source.dtype, bottom - top, self.columns) as values:
                self.source.read_into(values, first + top)
                out[top:bottom].copy_(values)
                refuse_overflow(self.name, values, out[top:bottom])

    def reference(self, first: int, last: int) -> torch.Tensor:
        return self.source.reference(first, last)

    def to(self, dtype: torch.dtype) -> Tensor:
        return self if dtype == self.dtype else self.source.to(dtype)

    def files(self) -> Iterator[Path]:
        return self.source.files()


@dataclass(frozen=True, eq=False)
class InMemory(Tensor):
    """A tensor in memory: a scalar, a vector, or a tensor that cannot be read in parts."""

    values: torch.Tensor
    origin: Path

    def read_into(self, out: torch.Tensor, first: int) -> None:
        out.copy_(self._matrix(first, first + len(out)))

    def reference(self, first: int, last: int) -> torch.Tensor:
        part = self._matrix(first, last)
        return part.double() if self.dtype.is_floating_point else part

    def files(self) -> Iterator[Path]:
        yield self.origin

    def _matrix(self, first: int, last: int) -> torch.Tensor:
        return self.values.reshape(self.rows, self.columns)[first:last]


def in_memory(name: str, values: torch.Tensor, origin: Path) -> InMemory:
    """`values`, which were read from the file `origin`, as a `Tensor`."""
    return InMemory(name, values.dtype, tuple(values.shape), values, origin)
