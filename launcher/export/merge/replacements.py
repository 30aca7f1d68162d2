"""Tensors in which an adapter's values replace all rows, replace some rows, or are added to a
bias."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from launcher.io.tensor import Cast, Tensor
from launcher.io.tensor.tiles import refuse_overflow


@dataclass(frozen=True, eq=False)
class Replaced(Cast):
    """Values that an adapter saved, in the base's dtype. They are rounded once, to the last dtype
    that was requested.

    PEFT rounds them when it loads them, before anything is added, and so does `reference`.
    """

    def reference(self, first: int, last: int) -> torch.Tensor:
        values = self.source.reference(first, last).to(self.dtype)
        return values.double() if self.dtype.is_floating_point else values

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype)


def as_summand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as the first summand of a sum in `dtype`: values that an adapter saved in `dtype`,
    the base's values in their stored dtype."""
    return tensor.to(dtype) if isinstance(tensor, Replaced) else tensor


@dataclass(frozen=True, eq=False)
class TokenRows(Tensor):
    """`source` with row indices[k] replaced by row k of `values`, which are not differences."""

    source: Tensor
    values: Tensor
    indices: tuple[int, ...]

    def read_into(self, out: torch.Tensor, first: int) -> None:
        self.source.read_into(out, first)
        for row, index in enumerate(self.indices):
            if first <= index < first + len(out):
                value = self.values.read(row, row + 1)
                rounded = out[index - first : index - first + 1].copy_(value)
                refuse_overflow(self.name, value, rounded)

    def reference(self, first: int, last: int) -> torch.Tensor:
        out = self.source.reference(first, last).clone()
        values = self.values.reference(0, len(self.indices))
        for index, row in zip(self.indices, values, strict=True):
            if first <= index < last:
                out[index - first] = row
        return out

    def files(self) -> Iterator[Path]:
        return itertools.chain(self.source.files(), self.values.files())

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, source=self.source.to(dtype))


@dataclass(frozen=True, eq=False)
class BiasSum(Tensor):
    """A bias plus scale · addend for each adapter, in fp32 with one rounding (lora_bias)."""

    refuses_overflow: ClassVar[bool] = True

    source: Tensor
    addends: tuple[tuple[Tensor, float], ...]  # (values, scale)

    def read_into(self, out: torch.Tensor, first: int) -> None:
        last = first + len(out)
        total = self._change(first, last) + self.source.read(first, last)
        refuse_overflow(self.name, total, out.copy_(total))

    def reference(self, first: int, last: int) -> torch.Tensor:
        total = self.source.rounded_reference(first, last)
        for addend, scale in self.addends:
            total = total + addend.rounded_reference(first, last) * scale
        return total

    def files(self) -> Iterator[Path]:
        parts = (self.source, *(addend for addend, _ in self.addends))
        return itertools.chain.from_iterable(part.files() for part in parts)

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, source=as_summand(self.source, dtype))

    def _change(self, first: int, last: int) -> torch.Tensor:
        """[last - first, 1] fp32: the sum of the scaled addends."""
        change = torch.zeros(last - first, 1)
        for addend, scale in self.addends:
            change += addend.read(first, last).float() * scale
        return change
