"""LoRA on experts that are fused into one weight [experts, …]: each expert is a matrix of its own.

PEFT keeps the factors of all experts in two matrices (tuners/lora/layer.py, ParamWrapper): A
[experts · rank, in], expert after expert, and B [out, rank · experts], the expert running fastest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.export.merge.kept import kept
from launcher.export.merge.lora import Delta, WithLora
from launcher.export.tensor import Rows, Stack, Tensor


@dataclass(frozen=True, eq=False)
class ExpertColumns(Tensor):
    """One expert's B [out, rank] of PEFT's [out, rank · experts]."""

    of: Tensor
    expert: int

    def fill(self, out: torch.Tensor, first: int) -> None:
        by_expert = kept(self.of, "by expert", self._by_expert)
        out.copy_(by_expert[self.expert, first : first + len(out)])

    def exact(self, first: int, last: int) -> torch.Tensor:
        rows = self.of.exact(first, last)
        return rows.view(last - first, self.columns, -1)[:, :, self.expert]

    def files(self) -> Iterator[Path]:
        return self.of.files()

    def _by_expert(self) -> torch.Tensor:
        outputs, rank = self.shape
        return self.of.whole().view(outputs, rank, -1).permute(2, 0, 1).contiguous()


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Tensor):
    """Matrices along the diagonal, zeros elsewhere: the B of projections fused below each other,
    as PEFT fuses them on load (utils/transformers_weight_conversion.py, PeftConcatenate)."""

    blocks: tuple[Tensor, ...]

    def fill(self, out: torch.Tensor, first: int) -> None:
        out.zero_()
        for block, row, column, top, bottom in self._within(first, first + len(out)):
            here = slice(row + top - first, row + bottom - first)
            out[here, column : column + block.columns] = block.read(top, bottom)

    def exact(self, first: int, last: int) -> torch.Tensor:
        out = torch.zeros(last - first, self.columns, dtype=torch.float64)
        for block, row, column, top, bottom in self._within(first, last):
            here = slice(row + top - first, row + bottom - first)
            out[here, column : column + block.columns] = block.exact(top, bottom)
        return out

    def files(self) -> Iterator[Path]:
        return itertools.chain.from_iterable(block.files() for block in self.blocks)

    def _within(self, first: int, last: int) -> Iterator[tuple[Tensor, int, int, int, int]]:
        """Block, its first row and column, and the rows of its own that lie in [first, last)."""
        row = column = 0
        for block in self.blocks:
            top, bottom = max(first - row, 0), min(last - row, block.rows)
            if top < bottom:
                yield block, row, column, top, bottom
            row, column = row + block.rows, column + block.columns


def delta_of_each(a: Tensor, b: Tensor, scale: float, experts: int) -> tuple[Delta, ...]:
    """The experts' deltas of the factors that PEFT keeps together."""
    rank = a.shape[0] // experts
    return tuple(
        Delta(
            Rows(a.name, a.dtype, (rank, a.shape[1]), a, each * rank),
            ExpertColumns(b.name, b.dtype, (b.shape[0], rank), b, each),
            scale,
        )
        for each in range(experts)
    )


def fused(pairs: tuple[tuple[Tensor, Tensor], ...], scale: float) -> Delta:
    """One delta of the (A, B) of projections that are fused below each other."""
    if len(pairs) == 1:
        return Delta(*pairs[0], scale)
    a, b = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    ranks = sum(each.shape[0] for each in a)
    outputs = sum(each.shape[0] for each in b)
    return Delta(
        Stack(a[0].name, a[0].dtype, (ranks, a[0].shape[1]), a),
        BlockDiagonal(b[0].name, b[0].dtype, (outputs, ranks), b),
        scale,
    )


def with_experts(of: Tensor, deltas: list[tuple[Delta, ...]], turned: bool, device: str) -> Tensor:
    """`of` [experts, …] with the deltas of several adapters, an entry an expert in each of them."""
    matrix = of.shape[1:]
    parts = tuple(
        WithLora(
            of.name,
            of.dtype,
            matrix,
            Rows(of.name, of.dtype, matrix, of, each * matrix[0]),
            tuple(delta[each] for delta in deltas),
            turned,
            delta_first=True,
            device=device,
        )
        for each in range(of.shape[0])
    )
    return Stack(of.name, of.dtype, of.shape, parts)
