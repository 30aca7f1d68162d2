"""Tensors that arrange another tensor's values in a way that does not keep whole rows."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from launcher.io.tensor.base import Tensor
from launcher.io.tensor.tiles import scratch, spans

_thread_cache = threading.local()


@dataclass(frozen=True)
class ColumnSlice(Tensor):
    """Columns [begin, …) of `source`, as many as `shape` needs."""

    source: Tensor
    begin: int

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.source.columns):
            with scratch(self.dtype, bottom - top, self.source.columns) as values:
                self.source.read_into(values, first + top)
                out[top:bottom].copy_(values[:, self.begin : self.begin + self.columns])

    def reference(self, first: int, last: int) -> torch.Tensor:
        return self.source.reference(first, last)[:, self.begin : self.begin + self.columns]

    def files(self) -> Iterator[Path]:
        return self.source.files()

    def to(self, dtype: torch.dtype) -> Tensor:
        source = self.source.to(dtype)
        return replace(self, dtype=source.dtype, source=source)


@dataclass(frozen=True)
class ConcatColumns(Tensor):
    """Tensors with the same number of rows, side by side."""

    parts: tuple[Tensor, ...]

    def read_into(self, out: torch.Tensor, first: int) -> None:
        left = 0
        for part in self.parts:
            right = left + part.columns
            for top, bottom in spans(len(out), part.columns):
                with scratch(self.dtype, bottom - top, part.columns) as values:
                    part.read_into(values, first + top)
                    out[top:bottom, left:right].copy_(values)
            left = right

    def reference(self, first: int, last: int) -> torch.Tensor:
        return torch.cat([part.reference(first, last) for part in self.parts], dim=1)

    def files(self) -> Iterator[Path]:
        return itertools.chain.from_iterable(part.files() for part in self.parts)

    def to(self, dtype: torch.dtype) -> Tensor:
        parts = tuple(part.to(dtype) for part in self.parts)
        return replace(self, dtype=parts[0].dtype, parts=parts)


@dataclass(frozen=True)
class Reshaped(Tensor):
    """The elements of `source` in the same order, in rows of another length."""

    source: Tensor

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            begin, end, rows = self._source_range(first + top, first + bottom)
            with scratch(self.dtype, rows[1] - rows[0], self.source.columns) as values:
                self.source.read_into(values, rows[0])
                out[top:bottom].copy_(values.view(-1)[begin:end].view(bottom - top, self.columns))

    def reference(self, first: int, last: int) -> torch.Tensor:
        begin, end, rows = self._source_range(first, last)
        return self.source.reference(*rows).reshape(-1)[begin:end].view(last - first, self.columns)

    def files(self) -> Iterator[Path]:
        return self.source.files()

    def to(self, dtype: torch.dtype) -> Tensor:
        source = self.source.to(dtype)
        return replace(self, dtype=source.dtype, source=source)

    def _source_range(self, first: int, last: int) -> tuple[int, int, tuple[int, int]]:
        """(begin, end, (top, bottom)): rows [first, last) are the elements [begin, end) of the
        source's rows [top, bottom)."""
        width = self.source.columns
        begin, end = first * self.columns, last * self.columns
        top, bottom = begin // width, -(-end // width)
        return begin - top * width, end - top * width, (top, bottom)


@dataclass(frozen=True)
class Transposed(Tensor):
    """`source` with its last two dims exchanged.

    `source` gives rows, and each of its columns is needed: the matrix that is being read stays in
    memory, one for each thread.
    """

    source: Tensor

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for index, begin, top, bottom in self._matrices(first, first + len(out)):
            matrix = self._cached_matrix(index)
            with scratch(self.dtype, self.columns, bottom - top) as part:
                part.copy_(matrix[:, top:bottom])  # torch transposes a contiguous matrix by blocks
                out[begin + top - first : begin + bottom - first].copy_(part.T)

    def reference(self, first: int, last: int) -> torch.Tensor:
        height = self.columns  # of a matrix of the source
        parts = []
        for index, _, top, bottom in self._matrices(first, last):
            begin = index * height
            columns = [
                self.source.reference(begin + first, begin + last)[:, top:bottom]
                for first, last in spans(height, self.source.columns)
            ]
            parts.append(torch.cat(columns).T)
        return torch.cat(parts)

    def files(self) -> Iterator[Path]:
        return self.source.files()

    def to(self, dtype: torch.dtype) -> Tensor:
        source = self.source.to(dtype)
        return replace(self, dtype=source.dtype, source=source)

    def _matrices(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """Each matrix that overlaps [first, last): its index, its first row in this tensor, and
        which of its own rows [top, bottom) overlap."""
        height = self.shape[-2]
        for i in range(first // height, -(-last // height)):
            begin = i * height
            yield i, begin, max(first - begin, 0), min(last - begin, height)

    def _cached_matrix(self, index: int) -> torch.Tensor:
        """Matrix `index` of the source."""
        cached: tuple[Tensor, int, torch.Tensor] | None = getattr(_thread_cache, "matrix", None)
        if cached is None or cached[0] is not self or cached[1] != index:
            _thread_cache.matrix = None  # frees the previous matrix before the next one is read
            values = self.source.read(index * self.columns, (index + 1) * self.columns)
            _thread_cache.matrix = cached = (self, index, values)
        return cached[2]
