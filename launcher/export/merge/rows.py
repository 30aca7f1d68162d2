"""What an adapter puts in a tensor's place, whole, in some rows, or as an addend of a bias."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from launcher.export.tensor import Cast, Tensor
from launcher.export.tensor.tiles import refuse_overflow


@dataclass(frozen=True, eq=False)
class Replaced(Cast):
    """Values that an adapter saved, in the base's dtype; rounded once, to the last dtype asked.

    PEFT rounds them when it loads them, before anything is added: so does `exact`.
    """

    def exact(self, first: int, last: int) -> torch.Tensor:
        values = self.of.exact(first, last).to(self.dtype)
        return values.double() if self.dtype.is_floating_point else values

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype)


def unrounded(of: Tensor, dtype: torch.dtype) -> Tensor:
    """What a sum in `dtype` is of: the base's values as they are stored, saved ones in `dtype`."""
    return of.to(dtype) if isinstance(of, Replaced) else of


@dataclass(frozen=True, eq=False)
class TokenRows(Tensor):
    """`of` with row indices[k] taken from row k of `values`: absolute, not a difference."""

    of: Tensor
    values: Tensor
    indices: tuple[int, ...]

    def fill(self, out: torch.Tensor, first: int) -> None:
        self.of.fill(out, first)
        for row, index in enumerate(self.indices):
            if first <= index < first + len(out):
                value = self.values.read(row, row + 1)
                here = out[index - first : index - first + 1].copy_(value)
                refuse_overflow(self.name, value, here)

    def exact(self, first: int, last: int) -> torch.Tensor:
        out = self.of.exact(first, last).clone()
        for index, row in zip(self.indices, self.values.exact(0, len(self.indices)), strict=True):
            if first <= index < last:
                out[index - first] = row
        return out

    def files(self) -> Iterator[Path]:
        return itertools.chain(self.of.files(), self.values.files())

    def to(self, dtype: torch.dtype) -> Tensor:
        return self if dtype == self.dtype else replace(self, dtype=dtype, of=self.of.to(dtype))


@dataclass(frozen=True, eq=False)
class BiasSum(Tensor):
    """A bias plus scale · addend for each adapter, in fp32 with one rounding (lora_bias)."""

    of: Tensor
    addends: tuple[tuple[Tensor, float], ...]

    def fill(self, out: torch.Tensor, first: int) -> None:
        last = first + len(out)
        total = self._change(first, last) + self.of.read(first, last)
        refuse_overflow(self.name, total, out.copy_(total))

    def exact(self, first: int, last: int) -> torch.Tensor:
        total = self.of.settled(first, last)
        for addend, scale in self.addends:
            total = total + addend.settled(first, last) * scale
        return total

    def files(self) -> Iterator[Path]:
        parts = (self.of, *(addend for addend, _ in self.addends))
        return itertools.chain.from_iterable(part.files() for part in parts)

    def to(self, dtype: torch.dtype) -> Tensor:
        return (
            self
            if dtype == self.dtype
            else replace(self, dtype=dtype, of=unrounded(self.of, dtype))
        )

    def _change(self, first: int, last: int) -> torch.Tensor:
        change = torch.zeros(last - first, 1)
        for addend, scale in self.addends:
            change += addend.read(first, last).float() * scale
        return change
