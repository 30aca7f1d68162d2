"""Weights as they are after bitsandbytes has quantized and dequantized them.

`blockwise.py` describes the layout and the arithmetic. This module reproduces the quantization of
bitsandbytes 0.50 on a CPU (backends/default/ops.py), bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from launcher.errors import UserError
from launcher.export.quantized.blockwise import STEP_8BIT, BlockRange, scale_blocks
from launcher.io.tensor import Tensor
from launcher.io.tensor.tiles import refuse_overflow, scratch, spans

BLOCK = 64  # elements for each magnitude, when transformers quantizes
MIN_ABSMAX = 1e-38  # the smallest divisor for a block
CELLS = 1024  # parts of [-1, 1], narrower than the smallest distance between two values of fp4

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_HALF = tuple(value / 12 for value in (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
FP4 = (*(-value for value in reversed(_FP4_HALF)), 0.0, 0.0, *_FP4_HALF)
VALUES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor(FP4)}  # float32, ascending

_thread_cache = threading.local()


@dataclass(frozen=True)
class RoundTrip4Bit(Tensor):
    """The values of `source` after quantization to 4 bits and back.

    With `nested`, the magnitudes of the whole tensor are computed first. They are cached for the
    one tensor that a thread is reading and take 1/16 byte for each element. The last bit of their
    mean depends on torch's number of threads.
    """

    source: Tensor
    kind: str  # nf4 or fp4
    nested: bool

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            block_range = BlockRange.covering(self, first + top, first + bottom, BLOCK)
            nested = self._nested_scales(block_range) if self.nested else None
            with scratch(torch.float32, 1, block_range.end - block_range.begin) as row:
                flat = row[0]
                absmax = self._read_blocks(block_range, flat)
                _divide_blocks(flat, absmax)
                _round_to_nearest(flat, self.kind)
                scale_blocks(flat, absmax if nested is None else nested, BLOCK)
                out[top:bottom].copy_(block_range.requested_rows(flat, self.columns))

    def reference(self, first: int, last: int) -> torch.Tensor:
        block_range = BlockRange.covering(self, first, last, BLOCK)
        source = self.source.reference(*block_range.rows).to(self.source.dtype).float()
        begin = block_range.begin - block_range.rows[0] * self.columns
        flat = source.reshape(-1).numpy()[begin:][: block_range.end - block_range.begin]
        values = VALUES[self.kind].numpy()
        nested = self._nested_scales(block_range).numpy() if self.nested else None
        parts = []
        for i, at in enumerate(range(0, len(flat), BLOCK)):
            block = flat[at : at + BLOCK]
            absmax = np.abs(block).max()
            divisor = np.maximum(absmax, np.float32(MIN_ABSMAX))
            is_full = len(block) == BLOCK
            unit = block * (np.float32(1) / divisor) if is_full else block / divisor
            above = unit[:, None] > (values[:-1] + values[1:]) / np.float32(2)
            parts.append(values[above.sum(axis=1)] * (absmax if nested is None else nested[i]))
        result = torch.from_numpy(np.concatenate(parts)).double()
        return block_range.requested_rows(result, self.columns)

    def to(self, dtype: torch.dtype) -> Tensor:
        return replace(self, dtype=dtype)

    def files(self) -> Iterator[Path]:
        return self.source.files()

    def _read_blocks(self, block_range: BlockRange, flat: torch.Tensor) -> torch.Tensor:
        """Write the elements of the blocks to `flat`. Returns the magnitude of each block."""
        first, last = block_range.rows
        with scratch(self.source.dtype, last - first, self.columns) as stored:
            self.source.read_into(stored, first)
            begin = block_range.begin - first * self.columns
            flat.copy_(stored.view(-1)[begin : begin + len(flat)])
        full = len(flat) // BLOCK * BLOCK
        parts = [flat[:full].view(-1, BLOCK), flat[full:].view(1, -1)]
        absmax = torch.cat([part.abs().amax(dim=1) for part in parts if part.numel()])
        if not absmax.isfinite().all():
            raise UserError(f"{self.name} contains a NaN or an infinity and cannot be quantized")
        return absmax

    def _nested_scales(self, block_range: BlockRange) -> torch.Tensor:
        """The magnitudes of the blocks after double quantization."""
        cached: tuple[Tensor, torch.Tensor] | None = getattr(_thread_cache, "scales", None)
        if cached is None or cached[0] is not self:
            _thread_cache.scales = cached = (self, self._all_nested_scales())
        return cached[1][block_range.begin // BLOCK : -(-block_range.end // BLOCK)]

    def _all_nested_scales(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        absmax = torch.empty(-(-self.rows * self.columns // BLOCK))
        for first, last in spans(self.rows, self.columns):
            block_range = BlockRange.covering(self, first, last, BLOCK)
            blocks = slice(block_range.begin // BLOCK, -(-block_range.end // BLOCK))
            with scratch(torch.float32, 1, block_range.end - block_range.begin) as row:
                absmax[blocks] = self._read_blocks(block_range, row[0])
        mean = absmax.mean()
        # bitsandbytes' CPU kernel does not always round to nearest: only the kernel gives its bits.
        scales: torch.Tensor = dequantize_blockwise(
            *quantize_blockwise(absmax - mean, blocksize=256)
        )
        return scales.add_(mean)


@dataclass(frozen=True)
class RoundTrip8Bit(Tensor):
    """The values of `source` after quantization to 8 bits, by way of float16, and back."""

    source: Tensor

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            stored = self.source.read(first + top, first + bottom)
            half = stored.half()
            refuse_overflow(self.name, stored, half)
            absmax = half.abs().amax(dim=1, keepdim=True).float()
            integers = torch.round(half * (127.0 / absmax)).nan_to_num_(0).to(torch.int8)
            out[top:bottom].copy_(integers * absmax * STEP_8BIT)

    def reference(self, first: int, last: int) -> torch.Tensor:
        stored = self.source.reference(first, last).to(self.source.dtype)
        half = stored.half().numpy().astype("f4")
        absmax = np.abs(half).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
        steps = inverse * np.float32(127)  # torch's 127 / absmax
        values = np.rint(half * steps) * absmax * np.float32(STEP_8BIT)
        return torch.from_numpy(values.astype("f8"))

    def to(self, dtype: torch.dtype) -> Tensor:
        return replace(self, dtype=dtype)

    def files(self) -> Iterator[Path]:
        return self.source.files()


@cache
def _cell_bounds(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of CELLS parts of [-1, 1]: the number of bounds between adjacent values below it,
    and the bound inside it, or infinity if there is none."""
    values = VALUES[kind]
    bounds = (values[:-1] + values[1:]) / 2
    cells = _cell(bounds, torch.empty_like(bounds)).int()
    assert len(cells.unique()) == len(cells), kind
    below = (cells[None] < torch.arange(CELLS + 1)[:, None]).sum(dim=1).int()
    inside = torch.full((CELLS + 1,), torch.inf)
    inside[cells] = bounds
    return below, inside


def _cell(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The cell of each value, before the conversion to an integer.

    It never decreases as the value grows, whatever the rounding. So a value in another cell than a
    bound is on the same side of the bound as its cell.
    """
    return torch.add(values, 1, out=out).mul_(CELLS / 2)


def _round_to_nearest(flat: torch.Tensor, kind: str) -> None:
    """Round each element of [-1, 1] to the nearest value, in place; halfway goes to the lower one.

    The result is that of `torch.bucketize` with the bounds, in an eighth of its time.
    """
    below, inside = _cell_bounds(kind)
    count = len(flat)
    with (
        scratch(torch.float32, 1, count) as bounds,
        scratch(torch.int32, 1, count) as cells,
        scratch(torch.int32, 1, count) as indices,
    ):
        cells.copy_(_cell(flat, bounds[0]))
        torch.index_select(inside, 0, cells[0], out=bounds[0])
        torch.index_select(below, 0, cells[0], out=indices[0])
        indices[0] += flat > bounds[0]
        torch.index_select(VALUES[kind], 0, indices[0], out=flat)


def _divide_blocks(flat: torch.Tensor, absmax: torch.Tensor) -> None:
    """Scale each block to [-1, 1], in place.

    A shorter last block is divided; the others are multiplied by a reciprocal, which rounds
    differently (bitsandbytes' backends/default/ops.py).
    """
    full = len(flat) // BLOCK * BLOCK
    divisors = absmax.clamp(min=MIN_ABSMAX)
    flat[:full].view(-1, BLOCK).mul_((1.0 / divisors[: full // BLOCK])[:, None])
    flat[full:].div_(divisors[-1])
    flat.clamp_(-1, 1)
