"""LoRA on experts that are fused into one weight [experts, …]: each expert is a separate matrix.

PEFT stores the factors of all experts in two matrices (tuners/lora/layer.py, ParamWrapper): A
[experts · rank, in], expert after expert, and B [out, rank · experts], with the expert as the
fastest-running index.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.export.merge.lora import Delta, WithLora
from launcher.export.merge.row_cache import cached
from launcher.io.tensor import ConcatRows, RowSlice, Tensor


@dataclass(frozen=True, eq=False)
class ExpertColumns(Tensor):
    """One expert's B [out, rank], taken from PEFT's [out, rank · experts]."""

    source: Tensor
    expert: int

    def read_into(self, out: torch.Tensor, first: int) -> None:
        by_expert = cached(self.source, "by expert", self._by_expert)
        out.copy_(by_expert[self.expert, first : first + len(out)])

    def reference(self, first: int, last: int) -> torch.Tensor:
        rows = self.source.reference(first, last)
        return rows.view(last - first, self.columns, -1)[:, :, self.expert]

    def files(self) -> Iterator[Path]:
        return self.source.files()

    def _by_expert(self) -> torch.Tensor:
        """[experts, out, rank]."""
        outputs, rank = self.shape
        return self.source.read_all().view(outputs, rank, -1).permute(2, 0, 1).contiguous()


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Tensor):
    """Matrices along the diagonal, and zeros elsewhere.

    This is the B of projections that are fused one below the other, as PEFT fuses them on load
    (utils/transformers_weight_conversion.py, PeftConcatenate).
    """

    blocks: tuple[Tensor, ...]

    def read_into(self, out: torch.Tensor, first: int) -> None:
        out.zero_()
        for block, row, column, top, bottom in self._overlapping(first, first + len(out)):
            rows = slice(row + top - first, row + bottom - first)
            out[rows, column : column + block.columns] = block.read(top, bottom)

    def reference(self, first: int, last: int) -> torch.Tensor:
        out = torch.zeros(last - first, self.columns, dtype=torch.float64)
        for block, row, column, top, bottom in self._overlapping(first, last):
            rows = slice(row + top - first, row + bottom - first)
            out[rows, column : column + block.columns] = block.reference(top, bottom)
        return out

    def files(self) -> Iterator[Path]:
        return itertools.chain.from_iterable(block.files() for block in self.blocks)

    def _overlapping(self, first: int, last: int) -> Iterator[tuple[Tensor, int, int, int, int]]:
        """Each block that overlaps rows [first, last): the block, its first row and column in this
        tensor, and which of its own rows [top, bottom) overlap."""
        row = column = 0
        for block in self.blocks:
            top, bottom = max(first - row, 0), min(last - row, block.rows)
            if top < bottom:
                yield block, row, column, top, bottom
            row, column = row + block.rows, column + block.columns


def deltas_per_expert(a: Tensor, b: Tensor, scale: float, experts: int) -> tuple[Delta, ...]:
    """One delta for each expert, from the factors that PEFT stores in one A and one B."""
    rank = a.shape[0] // experts
    return tuple(
        Delta(
            RowSlice(a.name, a.dtype, (rank, a.shape[1]), a, expert * rank),
            ExpertColumns(b.name, b.dtype, (b.shape[0], rank), b, expert),
            scale,
        )
        for expert in range(experts)
    )


def fuse_projections(pairs: tuple[tuple[Tensor, Tensor], ...], scale: float) -> Delta:
    """One delta from the (A, B) of projections that are fused one below the other."""
    if len(pairs) == 1:
        return Delta(*pairs[0], scale)
    a, b = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    ranks = sum(factor.shape[0] for factor in a)
    outputs = sum(factor.shape[0] for factor in b)
    return Delta(
        ConcatRows(a[0].name, a[0].dtype, (ranks, a[0].shape[1]), a),
        BlockDiagonal(b[0].name, b[0].dtype, (outputs, ranks), b),
        scale,
    )


def with_experts(
    source: Tensor, deltas: list[tuple[Delta, ...]], transposed: bool, device: str
) -> Tensor:
    """`source` [experts, …] with the deltas of several adapters added. Each tuple has one delta for
    each expert."""
    matrix = source.shape[1:]
    parts = tuple(
        WithLora(
            source.name,
            source.dtype,
            matrix,
            RowSlice(source.name, source.dtype, matrix, source, expert * matrix[0]),
            tuple(adapter_deltas[expert] for adapter_deltas in deltas),
            transposed,
            delta_first=True,
            device=device,
        )
        for expert in range(source.shape[0])
    )
    return ConcatRows(source.name, source.dtype, source.shape, parts)
