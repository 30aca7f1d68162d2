"""Another tensor's values in another arrangement than whole rows one below the other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from launcher.export.tensor.base import Tensor
from launcher.export.tensor.tiles import scratch, spans

_own = threading.local()


@dataclass(frozen=True)
class Columns(Tensor):
    """Columns [begin, …) of another tensor, as many as `shape` needs."""

    of: Tensor
    begin: int

    def fill(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.of.columns):
            with scratch(self.dtype, bottom - top, self.of.columns) as values:
                self.of.fill(values, first + top)
                out[top:bottom].copy_(values[:, self.begin : self.begin + self.columns])

    def exact(self, first: int, last: int) -> torch.Tensor:
        return self.of.exact(first, last)[:, self.begin : self.begin + self.columns]

    def files(self) -> Iterator[Path]:
        return self.of.files()

    def to(self, dtype: torch.dtype) -> Tensor:
        of = self.of.to(dtype)
        return replace(self, dtype=of.dtype, of=of)


@dataclass(frozen=True)
class Beside(Tensor):
    """Tensors of the same rows side by side."""

    of: tuple[Tensor, ...]

    def fill(self, out: torch.Tensor, first: int) -> None:
        left = 0
        for part in self.of:
            right = left + part.columns
            for top, bottom in spans(len(out), part.columns):
                with scratch(self.dtype, bottom - top, part.columns) as values:
                    part.fill(values, first + top)
                    out[top:bottom, left:right].copy_(values)
            left = right

    def exact(self, first: int, last: int) -> torch.Tensor:
        return torch.cat([part.exact(first, last) for part in self.of], dim=1)

    def files(self) -> Iterator[Path]:
        return itertools.chain.from_iterable(part.files() for part in self.of)

    def to(self, dtype: torch.dtype) -> Tensor:
        of = tuple(part.to(dtype) for part in self.of)
        return replace(self, dtype=of[0].dtype, of=of)


@dataclass(frozen=True)
class Reshaped(Tensor):
    """The same elements in rows of another length."""

    of: Tensor

    def fill(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            begin, end, rows = self._within(first + top, first + bottom)
            with scratch(self.dtype, rows[1] - rows[0], self.of.columns) as values:
                self.of.fill(values, rows[0])
                out[top:bottom].copy_(values.view(-1)[begin:end].view(bottom - top, self.columns))

    def exact(self, first: int, last: int) -> torch.Tensor:
        begin, end, rows = self._within(first, last)
        return self.of.exact(*rows).reshape(-1)[begin:end].view(last - first, self.columns)

    def files(self) -> Iterator[Path]:
        return self.of.files()

    def to(self, dtype: torch.dtype) -> Tensor:
        of = self.of.to(dtype)
        return replace(self, dtype=of.dtype, of=of)

    def _within(self, first: int, last: int) -> tuple[int, int, tuple[int, int]]:
        """Elements [begin, end) of the other's rows [top, bottom) are rows [first, last) here."""
        width = self.of.columns
        begin, end = first * self.columns, last * self.columns
        top, bottom = begin // width, -(-end // width)
        return begin - top * width, end - top * width, (top, bottom)


@dataclass(frozen=True)
class Transposed(Tensor):
    """The last two dims of another tensor exchanged. The matrix being read is kept, one a thread:
    each of its columns is needed in turn and the other tensor gives rows."""

    of: Tensor

    def fill(self, out: torch.Tensor, first: int) -> None:
        for i, begin, top, bottom in self._matrices(first, first + len(out)):
            matrix = self._kept(i)
            out[begin + top - first : begin + bottom - first].copy_(matrix[:, top:bottom].T)

    def exact(self, first: int, last: int) -> torch.Tensor:
        height = self.columns  # of a matrix of the other tensor
        return torch.cat(
            [
                torch.stack([self.of.exact(i * height + r, i * height + r + 1)[0, top:bottom]
                             for r in range(height)], dim=1)
                for i, _, top, bottom in self._matrices(first, last)
            ]
        )  # fmt: skip

    def files(self) -> Iterator[Path]:
        return self.of.files()

    def to(self, dtype: torch.dtype) -> Tensor:
        of = self.of.to(dtype)
        return replace(self, dtype=of.dtype, of=of)

    def _matrices(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """Matrix, its first row here, and the rows of its own that lie in [first, last)."""
        height = self.shape[-2]
        for i in range(first // height, -(-last // height)):
            begin = i * height
            yield i, begin, max(first - begin, 0), min(last - begin, height)

    def _kept(self, i: int) -> torch.Tensor:
        kept: tuple[Tensor, int, torch.Tensor] | None = getattr(_own, "matrix", None)
        if kept is None or kept[0] is not self or kept[1] != i:
            _own.matrix = None  # frees the former before the next is read
            kept = (self, i, self.of.read(i * self.columns, (i + 1) * self.columns))
            _own.matrix = kept
        return kept[2]
