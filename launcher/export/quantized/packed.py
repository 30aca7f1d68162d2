"""Numbers of less than a byte, as they are packed in files, and packed again.

4-bit floating point (E2M1): two in a byte, the first in the low half. Integers of b bits: 32 / b in
an int32, the first in the lowest bits, with an offset that makes them positive (compressed-tensors,
pack_quantized).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from launcher.io.tensor import Tensor
from launcher.io.tensor.tiles import spans

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and the same with a sign, from 8 on
WORD_BITS = 32


@dataclass(frozen=True)
class UnpackedFloats(Tensor):
    """E2M1 numbers as fp32 [..., 2 · columns], from bytes [..., columns]."""

    packed: Tensor

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            packed = self.packed.read(first + top, first + bottom).view(torch.uint8)
            pairs = _pairs().index_select(0, packed.view(-1).int())
            out[top:bottom].copy_(pairs.view(torch.float32).view(bottom - top, -1))

    def reference(self, first: int, last: int) -> torch.Tensor:
        packed = self.packed.read(first, last).view(torch.uint8)
        nibbles = torch.stack([packed % 16, packed // 16], dim=-1).view(last - first, -1)
        magnitudes = torch.tensor(E2M1, dtype=torch.float64)[(nibbles % 8).long()]
        return torch.where(nibbles >= 8, -magnitudes, magnitudes)

    def files(self) -> Iterator[Path]:
        return self.packed.files()


@dataclass(frozen=True)
class UnpackedIntegers(Tensor):
    """Integers as int8 [..., columns], from int32 words. `down`: each word contains numbers of one
    column, one below the other, instead of one row."""

    packed: Tensor
    bits: int
    down: bool = False

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            out[top:bottom].copy_(self._unpack(first + top, first + bottom))

    def reference(self, first: int, last: int) -> torch.Tensor:
        return self._unpack(first, last)

    def files(self) -> Iterator[Path]:
        return self.packed.files()

    def _unpack(self, first: int, last: int) -> torch.Tensor:
        count = WORD_BITS // self.bits
        top = first // count if self.down else first
        words = self.packed.read(top, -(-last // count) if self.down else last)
        shifts = torch.arange(count, dtype=torch.int32) * self.bits
        numbers = (words[..., None] >> shifts & (1 << self.bits) - 1) - (1 << self.bits - 1)
        if not self.down:
            return numbers.view(last - first, -1)[:, : self.columns]
        rows = numbers.transpose(1, 2).reshape(-1, self.columns)
        return rows[first - top * count : last - top * count]


@cache
def _pairs() -> torch.Tensor:
    """[256] int64: the two fp32 values of each byte, as one number."""
    values = torch.tensor((*E2M1, *(-value for value in E2M1)))
    high, low = torch.cartesian_prod(values, values).unbind(1)
    return torch.stack([low, high], dim=1).view(torch.int64).view(-1)
