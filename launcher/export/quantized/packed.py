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
HALF_STEPS, HALF_STEPS_BITS = 2.0**22, 0x4A800000  # fp32 from here on has steps of 0.5
ONE_CODE = (127 << 1) - E2M1.index(1.0)  # from the highest bits of fp32 to the code


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


def pack_integers(values: torch.Tensor, bits: int, words: int) -> torch.Tensor:
    """The nearest integers to `values` (fp32 [rows, columns], overwritten), as int32
    [rows, words]."""
    offset, count = 1 << bits - 1, WORD_BITS // bits
    values = values.round_().clamp_(-offset, offset - 1).add_(offset)
    rest = words * count - values.shape[1]
    if rest:
        values = torch.nn.functional.pad(values, (0, rest))
    numbers = values.to(torch.uint8)
    width = bits
    while width < 8:  # two neighbors become one number of twice the bits
        low, high = numbers.unflatten(1, (-1, 2)).unbind(2)
        numbers, width = low | high << width, 2 * width
    return numbers.view(torch.int32)


def pack_floats(values: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 numbers to `values` (fp32 [rows, columns], overwritten), as bytes
    [rows, columns / 2]. Halfway between two numbers, the even code is taken."""
    signs = values.view(torch.int32) >> 28
    signs &= 8
    sizes = values.abs_().clamp_(max=E2M1[-1])
    codes = sizes.view(torch.int32)
    normal = codes >> 22  # from 1 on: the exponent and one bit, rounded to the nearest
    normal &= 1
    normal += codes
    normal += 0x1FFFFF - (ONE_CODE << 22)
    normal >>= 22
    sizes += HALF_STEPS  # below 1: steps of 0.5
    codes -= HALF_STEPS_BITS
    codes.clamp_(max=E2M1.index(1.0))
    torch.maximum(codes, normal, out=codes)
    codes |= signs
    low, high = codes.view(torch.uint8)[:, ::4].unflatten(1, (-1, 2)).unbind(2)
    packed: torch.Tensor = low | high << 4
    return packed


@cache
def _pairs() -> torch.Tensor:
    """[256] int64: the two fp32 values of each byte, as one number."""
    values = torch.tensor((*E2M1, *(-value for value in E2M1)))
    high, low = torch.cartesian_prod(values, values).unbind(1)
    return torch.stack([low, high], dim=1).view(torch.int64).view(-1)
