"""W + scale · B A and its variants, in fp32 with one rounding, a span of rows at a time.

Bit-equal to `PeftModel.from_pretrained(base, folder).merge_and_unload()` of PEFT 0.21 with its
defaults (tuners/lora/layer.py and dora.py): factors in fp32, the scale applied after the product.
A product of THINNEST_TILE rows and more has the bits of the whole product; fewer may not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from launcher.export.merge.kept import in_fp32, kept
from launcher.export.merge.rows import unrounded
from launcher.export.tensor import Tensor
from launcher.export.tensor.tiles import THINNEST_TILE, refuse_overflow, scratch, spans


@dataclass(frozen=True, eq=False)
class Delta:
    """One adapter's change of one weight of `out` outputs and `in` inputs."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float
    magnitude: Tensor | None = None  # [out]: DoRA

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


@dataclass(frozen=True, eq=False)
class WithLora(Tensor):
    """A matrix [out, in], or [in, out] when `turned`, with deltas added; several are summed first.

    `delta_first`: the sum of the deltas is rounded to `dtype` before it is added, as PEFT does for
    embeddings and for parameters targeted directly. DoRA has one delta: each output's weights are
    scaled to the length that `magnitude` says. `device`: where factors are multiplied.
    """

    of: Tensor
    deltas: tuple[Delta, ...]
    turned: bool = False
    delta_first: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        inputs, outputs = self.shape if self.turned else self.shape[::-1]
        for delta in self.deltas:
            assert delta.a.shape[1] == inputs, (self.name, delta.a.shape)
            assert delta.b.shape == (outputs, delta.a.shape[0]), (self.name, delta.b.shape)
            assert delta.magnitude is None or len(self.deltas) == 1, self.name

    def fill(self, out: torch.Tensor, first: int) -> None:
        low, high = _widened(first, first + len(out), self.rows)
        if high - low > len(out):
            out.copy_(self.read(low, high)[first - low : first - low + len(out)])
            return
        for top, bottom in spans(len(out), self.columns):
            with scratch(torch.float32, bottom - top, self.columns) as total:
                self._sum(total, first + top)
                if self.deltas[0].magnitude is not None:
                    self._stretch(total, self.deltas[0].magnitude, first + top)
                out[top:bottom].copy_(total)
                refuse_overflow(self.name, total, out[top:bottom])

    def exact(self, first: int, last: int) -> torch.Tensor:
        total = self._exact_sum(first, last)
        magnitude = self.deltas[0].magnitude
        if magnitude is None:
            return total
        length = magnitude.settled(0, magnitude.rows)
        if not self.turned:
            norm = total.square().sum(1, keepdim=True).sqrt()
            return length[first:last] / norm * total
        norm = kept(self, "exact norm", self._exact_column_norm)
        return length.T / norm * total

    def files(self) -> Iterator[Path]:
        parts = (self.of, *itertools.chain.from_iterable(each.tensors for each in self.deltas))
        return itertools.chain.from_iterable(part.files() for part in parts)

    def to(self, dtype: torch.dtype) -> Tensor:
        return (
            self
            if dtype == self.dtype
            else replace(self, dtype=dtype, of=unrounded(self.of, dtype))
        )

    def _sum(self, total: torch.Tensor, first: int) -> None:
        """W + the deltas, rows [first, first + len(total)), in fp32."""
        self._product(total, self.deltas[0], first)
        for delta in self.deltas[1:]:
            with scratch(torch.float32, *total.shape) as more:
                self._product(more, delta, first)
                total.add_(more)
        if self.delta_first:
            with scratch(self.dtype, *total.shape) as rounded:
                total.copy_(rounded.copy_(total))
        with scratch(self.of.dtype, *total.shape) as weight:
            self.of.fill(weight, first)
            total.add_(weight)

    def _product(self, out: torch.Tensor, delta: Delta, first: int) -> None:
        last = first + len(out)
        if self.turned:
            left = in_fp32(delta.a, self.device)[:, first:last].T
            right = in_fp32(delta.b, self.device).T
        else:
            left = delta.b.read(first, last).float().to(self.device)
            right = in_fp32(delta.a, self.device)
        if self.device == "cpu":
            torch.mm(left, right, out=out)
        else:
            out.copy_(torch.mm(left, right))
        out.mul_(delta.scale)

    def _stretch(self, total: torch.Tensor, magnitude: Tensor, first: int) -> None:
        """total · magnitude / the length of each output's weights."""
        if self.turned:
            norm = kept(self, "norm", self._column_norm)
            total.mul_(in_fp32(magnitude) / norm)
        else:
            norm = torch.linalg.norm(total, dim=1)
            factor = magnitude.read(first, first + len(total)).view(-1).float() / norm
            total.mul_(factor[:, None])

    def _column_norm(self) -> torch.Tensor:
        """[columns] fp32: row after row, the order in which torch sums a strided norm; the root in
        float64, because torch's own in fp32 is not correctly rounded for a vector."""
        squares = torch.zeros(self.columns)
        for top, bottom in spans(self.rows, self.columns):
            with scratch(torch.float32, bottom - top, self.columns) as total:
                self._sum(total, top)
                for row in total.square_():
                    squares.add_(row)
        return squares.double().sqrt().float()

    def _exact_column_norm(self) -> torch.Tensor:
        squares = torch.zeros(1, self.columns, dtype=torch.float64)
        for top, bottom in spans(self.rows, self.columns):
            squares += self._exact_sum(top, bottom).square().sum(0, keepdim=True)
        return squares.sqrt()

    def _exact_sum(self, first: int, last: int) -> torch.Tensor:
        change = torch.zeros(last - first, self.columns, dtype=torch.float64)
        for delta in self.deltas:
            rank, outputs = delta.a.rows, delta.b.rows
            if self.turned:
                inputs = delta.a.settled(0, rank)[:, first:last]
                product = torch.einsum("ki,ok->io", inputs, delta.b.settled(0, outputs))
            else:
                inputs = delta.a.settled(0, rank)
                product = torch.einsum("ok,ki->oi", delta.b.settled(first, last), inputs)
            change += product * delta.scale
        if self.delta_first:
            change = change.to(self.dtype).double()
        return self.of.settled(first, last) + change


def _widened(first: int, last: int, rows: int) -> tuple[int, int]:
    """[first, last) grown to THINNEST_TILE rows, or to all there are."""
    if last - first >= THINNEST_TILE:
        return first, last
    low = max(0, min(first, rows - THINNEST_TILE))
    return low, min(rows, max(last, low + THINNEST_TILE))
