"""Weights as they are after bitsandbytes has quantised them, and dequantised them again.

The layout and arithmetic are described in `blockwise.py`; here are bitsandbytes 0.50's decisions on
a CPU (backends/default/ops.py), bit for bit.
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
from launcher.export.quantised.blockwise import STEP_8, Run, scale
from launcher.export.tensor import Tensor
from launcher.export.tensor.tiles import refuse_overflow, scratch, spans

BLOCK = 64  # elements to one magnitude, when transformers quantises
SMALLEST = 1e-38  # a block's magnitude, as a divisor
CELLS = 1024  # of [-1, 1]; narrower than the closest values of fp4 are apart

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_HALF = tuple(value / 12 for value in (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
FP4 = (*(-value for value in reversed(_FP4_HALF)), 0.0, 0.0, *_FP4_HALF)
VALUES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor(FP4)}  # float32, ascending

_own = threading.local()


@dataclass(frozen=True)
class Through4Bit(Tensor):
    """Another tensor's values after quantisation to 4 bits and back. With `nested` the magnitudes
    of the whole tensor are found first and kept, 1/16 byte an element, for the one tensor that a
    thread is reading; their mean depends on torch's number of threads in its last bit."""

    of: Tensor
    kind: str  # nf4 or fp4
    nested: bool

    def fill(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            run = Run.around(self, first + top, first + bottom, BLOCK)
            nested = self._nested(run) if self.nested else None
            with scratch(torch.float32, 1, run.end - run.begin) as row:
                flat = row[0]
                absmax = self._read(run, flat)
                _divide(flat, absmax)
                _to_nearest(flat, self.kind)
                scale(flat, absmax if nested is None else nested, BLOCK)
                out[top:bottom].copy_(run.asked(flat, self.columns))

    def exact(self, first: int, last: int) -> torch.Tensor:
        run = Run.around(self, first, last, BLOCK)
        source = self.of.exact(*run.rows).to(self.of.dtype).float().reshape(-1).numpy()
        source = source[run.begin - run.rows[0] * self.columns :][: run.end - run.begin]
        values = VALUES[self.kind].numpy()
        nested = self._nested(run).numpy() if self.nested else None
        parts = []
        for i, at in enumerate(range(0, len(source), BLOCK)):
            block = source[at : at + BLOCK]
            absmax = np.abs(block).max()
            size = np.maximum(absmax, np.float32(SMALLEST))
            unit = block * (np.float32(1) / size) if len(block) == BLOCK else block / size
            above = unit[:, None] > (values[:-1] + values[1:]) / np.float32(2)
            parts.append(values[above.sum(axis=1)] * (absmax if nested is None else nested[i]))
        return run.asked(torch.from_numpy(np.concatenate(parts)).double(), self.columns)

    def to(self, dtype: torch.dtype) -> Tensor:
        return replace(self, dtype=dtype)

    def files(self) -> Iterator[Path]:
        return self.of.files()

    def _read(self, run: Run, flat: torch.Tensor) -> torch.Tensor:
        """Fill `flat` with the run's elements; the magnitudes of its blocks."""
        with scratch(self.of.dtype, run.rows[1] - run.rows[0], self.columns) as stored:
            self.of.fill(stored, run.rows[0])
            begin = run.begin - run.rows[0] * self.columns
            flat.copy_(stored.view(-1)[begin : begin + len(flat)])
        full = len(flat) // BLOCK * BLOCK
        parts = [flat[:full].view(-1, BLOCK), flat[full:].view(1, -1)]
        absmax = torch.cat([part.abs().amax(dim=1) for part in parts if part.numel()])
        if not absmax.isfinite().all():
            raise UserError(f"{self.name} holds a NaN or an infinity and cannot be quantised")
        return absmax

    def _nested(self, run: Run) -> torch.Tensor:
        kept: tuple[Tensor, torch.Tensor] | None = getattr(_own, "scales", None)
        if kept is None or kept[0] is not self:
            _own.scales = kept = (self, self._all_scales())
        return kept[1][run.begin // BLOCK : -(-run.end // BLOCK)]

    def _all_scales(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        absmax = torch.empty(-(-self.rows * self.columns // BLOCK))
        for first, last in spans(self.rows, self.columns):
            run = Run.around(self, first, last, BLOCK)
            with scratch(torch.float32, 1, run.end - run.begin) as row:
                absmax[run.begin // BLOCK : -(-run.end // BLOCK)] = self._read(run, row[0])
        mean = absmax.mean()
        # its CPU kernel is not quite nearest, so no other code gives its bits
        scales: torch.Tensor = dequantize_blockwise(
            *quantize_blockwise(absmax - mean, blocksize=256)
        )
        return scales.add_(mean)


@dataclass(frozen=True)
class Through8Bit(Tensor):
    """Another tensor's values after quantisation to 8 bits, by way of float16, and back."""

    of: Tensor

    def fill(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            stored = self.of.read(first + top, first + bottom)
            half = stored.half()
            refuse_overflow(self.name, stored, half)
            absmax = half.abs().amax(dim=1, keepdim=True).float()
            whole = torch.round(half * (127.0 / absmax)).nan_to_num_(0).to(torch.int8)
            out[top:bottom].copy_(whole * absmax * STEP_8)

    def exact(self, first: int, last: int) -> torch.Tensor:
        half = self.of.exact(first, last).to(self.of.dtype).half().numpy().astype("f4")
        absmax = np.abs(half).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
        steps = inverse * np.float32(127)  # torch's 127 / absmax
        values = np.rint(half * steps) * absmax * np.float32(STEP_8)
        return torch.from_numpy(values.astype("f8"))

    def to(self, dtype: torch.dtype) -> Tensor:
        return replace(self, dtype=dtype)

    def files(self) -> Iterator[Path]:
        return self.of.files()


@cache
def _cells(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of CELLS parts of [-1, 1]: how many bounds between neighbouring values lie below it,
    and the one bound that lies in it, or infinity."""
    values = VALUES[kind]
    bounds = (values[:-1] + values[1:]) / 2
    cells = _cell(bounds, torch.empty_like(bounds)).int()
    assert len(cells.unique()) == len(cells), kind
    below = (cells[None] < torch.arange(CELLS + 1)[:, None]).sum(dim=1).int()
    within = torch.full((CELLS + 1,), torch.inf)
    within[cells] = bounds
    return below, within


def _cell(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Never decreases with the value, however it rounds, so what is in another cell than a bound
    is on the same side of it as the cell."""
    return torch.add(values, 1, out=out).mul_(CELLS / 2)


def _to_nearest(flat: torch.Tensor, kind: str) -> None:
    """Each of [-1, 1] to the nearest value, one halfway to the lower: what `torch.bucketize` finds
    among the bounds, at an eighth of its time."""
    below, within = _cells(kind)
    count = len(flat)
    with (
        scratch(torch.float32, 1, count) as bounds,
        scratch(torch.int32, 1, count) as cells,
        scratch(torch.int32, 1, count) as indices,
    ):
        cells.copy_(_cell(flat, bounds[0]))
        torch.index_select(within, 0, cells[0], out=bounds[0])
        torch.index_select(below, 0, cells[0], out=indices[0])
        indices[0] += flat > bounds[0]
        torch.index_select(VALUES[kind], 0, indices[0], out=flat)


def _divide(flat: torch.Tensor, absmax: torch.Tensor) -> None:
    """Bring each block into [-1, 1]: a shorter last one is divided, the others are multiplied by a
    reciprocal, which rounds differently (bitsandbytes' backends/default/ops.py)."""
    full = len(flat) // BLOCK * BLOCK
    sizes = absmax.clamp(min=SMALLEST)
    flat[:full].view(-1, BLOCK).mul_((1.0 / sizes[: full // BLOCK])[:, None])
    flat[full:].div_(sizes[-1])
    flat.clamp_(-1, 1)
