"""W + scale · B A and its variants, in fp32 with one rounding, a span of rows at a time.

The result is bit-equal to `PeftModel.from_pretrained(base, folder).merge_and_unload()` of PEFT 0.21
with its defaults (tuners/lora/layer.py and dora.py): factors in fp32, the scale applied after the
product. A product of at least MIN_TILE_ROWS rows has the same bits as the product of all rows; a
product of fewer rows may differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from launcher.export.merge.replacements import as_summand
from launcher.export.merge.row_cache import cached, cached_fp32
from launcher.io.tensor import Tensor
from launcher.io.tensor.tiles import MIN_TILE_ROWS, refuse_overflow, scratch, spans


@dataclass(frozen=True, eq=False)
class Delta:
    """One adapter's change to one weight with `out` outputs and `in` inputs."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float
    magnitude: Tensor | None = None  # [out]: DoRA

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


@dataclass(frozen=True, eq=False)
class WithLora(Tensor):
    """A matrix [out, in], or [in, out] if `transposed`, with deltas added. Several deltas are
    summed first.

    `delta_first`: the sum of the deltas is rounded to `dtype` before it is added, as PEFT does for
    embeddings and for parameters that are targeted directly. DoRA has one delta: the weights of
    each output are rescaled to the norm in `magnitude`. `device`: where factors are multiplied.
    """

    refuses_overflow: ClassVar[bool] = True

    source: Tensor
    deltas: tuple[Delta, ...]
    transposed: bool = False
    delta_first: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        inputs, outputs = self.shape if self.transposed else self.shape[::-1]
        for delta in self.deltas:
            assert delta.a.shape[1] == inputs, (self.name, delta.a.shape)
            assert delta.b.shape == (outputs, delta.a.shape[0]), (self.name, delta.b.shape)
            assert delta.magnitude is None or len(self.deltas) == 1, self.name

    def read_into(self, out: torch.Tensor, first: int) -> None:
        low, high = _widen(first, first + len(out), self.rows)
        if high - low > len(out):
            out.copy_(self.read(low, high)[first - low : first - low + len(out)])
            return
        for top, bottom in spans(len(out), self.columns):
            with scratch(torch.float32, bottom - top, self.columns) as total:
                self._sum(total, first + top)
                if self.deltas[0].magnitude is not None:
                    self._apply_magnitude(total, self.deltas[0].magnitude, first + top)
                out[top:bottom].copy_(total)
                refuse_overflow(self.name, total, out[top:bottom])

    def reference(self, first: int, last: int) -> torch.Tensor:
        total = self._reference_sum(first, last)
        magnitude = self.deltas[0].magnitude
        if magnitude is None:
            return total
        length = magnitude.rounded_reference(0, magnitude.rows)
        if not self.transposed:
            norm = total.square().sum(1, keepdim=True).sqrt()
            return length[first:last] / norm * total
        norm = cached(self, "reference norm", self._reference_column_norm)
        return length.T / norm * total

    def files(self) -> Iterator[Path]:
        factors = itertools.chain.from_iterable(delta.tensors for delta in self.deltas)
        return itertools.chain.from_iterable(part.files() for part in (self.source, *factors))

    def to(self, dtype: torch.dtype) -> Tensor:
        if dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, source=as_summand(self.source, dtype))

    def _sum(self, total: torch.Tensor, first: int) -> None:
        """Write W + the deltas to `total`, rows [first, first + len(total)), in fp32."""
        self._product(total, self.deltas[0], first)
        for delta in self.deltas[1:]:
            with scratch(torch.float32, *total.shape) as product:
                self._product(product, delta, first)
                total.add_(product)
        if self.delta_first:
            with scratch(self.dtype, *total.shape) as rounded:
                total.copy_(rounded.copy_(total))
        with scratch(self.source.dtype, *total.shape) as weight:
            self.source.read_into(weight, first)
            total.add_(weight)

    def _product(self, out: torch.Tensor, delta: Delta, first: int) -> None:
        """Write scale · B A to `out`, rows [first, first + len(out))."""
        last = first + len(out)
        if self.transposed:
            left = cached_fp32(delta.a, self.device)[:, first:last].T
            right = cached_fp32(delta.b, self.device).T
        else:
            left = delta.b.read(first, last).float().to(self.device)
            right = cached_fp32(delta.a, self.device)
        if self.device == "cpu":
            torch.mm(left, right, out=out)
        else:
            out.copy_(torch.mm(left, right))
        out.mul_(delta.scale)

    def _apply_magnitude(self, total: torch.Tensor, magnitude: Tensor, first: int) -> None:
        """Multiply `total` by magnitude / the norm of each output's weights."""
        if self.transposed:
            norm = cached(self, "norm", self._column_norm)
            total.mul_(cached_fp32(magnitude) / norm)
        else:
            norm = torch.linalg.norm(total, dim=1)
            factor = magnitude.read(first, first + len(total)).view(-1).float() / norm
            total.mul_(factor[:, None])

    def _column_norm(self) -> torch.Tensor:
        """[columns] fp32. Squares are added row after row, the order in which torch sums a strided
        norm. The root is taken in float64: torch's fp32 root of a vector is not correctly
        rounded."""
        squares = torch.zeros(self.columns)
        for top, bottom in spans(self.rows, self.columns):
            with scratch(torch.float32, bottom - top, self.columns) as total:
                self._sum(total, top)
                for row in total.square_():
                    squares.add_(row)
        return squares.double().sqrt().float()

    def _reference_column_norm(self) -> torch.Tensor:
        squares = torch.zeros(1, self.columns, dtype=torch.float64)
        for top, bottom in spans(self.rows, self.columns):
            squares += self._reference_sum(top, bottom).square().sum(0, keepdim=True)
        return squares.sqrt()

    def _reference_sum(self, first: int, last: int) -> torch.Tensor:
        change = torch.zeros(last - first, self.columns, dtype=torch.float64)
        for delta in self.deltas:
            rank, outputs = delta.a.rows, delta.b.rows
            if self.transposed:
                inputs = delta.a.rounded_reference(0, rank)[:, first:last]
                product = torch.einsum("ki,ok->io", inputs, delta.b.rounded_reference(0, outputs))
            else:
                inputs = delta.a.rounded_reference(0, rank)
                product = torch.einsum("ok,ki->oi", delta.b.rounded_reference(first, last), inputs)
            change += product * delta.scale
        if self.delta_first:
            change = change.to(self.dtype).double()
        return self.source.rounded_reference(first, last) + change


def _widen(first: int, last: int, rows: int) -> tuple[int, int]:
    """[first, last) extended to MIN_TILE_ROWS rows, or to all rows if there are fewer."""
    if last - first >= MIN_TILE_ROWS:
        return first, last
    low = max(0, min(first, rows - MIN_TILE_ROWS))
    return low, min(rows, max(last, low + MIN_TILE_ROWS))
