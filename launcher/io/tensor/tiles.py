"""The row ranges in which a tensor is processed, scratch memory, and the check for overflow."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from launcher.errors import UserError

MIN_TILE_ROWS = 64  # a product of fewer rows may round differently from the product of all rows
SPAN_ELEMENTS = 1 << 18

_thread_cache = threading.local()


def tiles(rows: int, row_bytes: int, nbytes: int) -> list[tuple[int, int]]:
    """Row ranges of about `nbytes` each, with at least MIN_TILE_ROWS rows unless the tensor has
    fewer."""
    return _ranges(rows, nbytes // max(1, row_bytes))


def spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges of about SPAN_ELEMENTS, small enough for the processor's cache."""
    return _ranges(rows, SPAN_ELEMENTS // max(1, columns))


def _ranges(rows: int, step: int) -> list[tuple[int, int]]:
    starts = list(range(0, rows, max(MIN_TILE_ROWS, step)))
    if len(starts) > 1 and rows - starts[-1] < MIN_TILE_ROWS:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows], strict=True)) if starts else []


@contextmanager
def scratch(dtype: torch.dtype, rows: int, columns: int) -> Iterator[torch.Tensor]:
    """An uninitialized [rows, columns] for this thread, valid in the `with` block.

    The memory is reused: the page faults of new memory would cost more than the arithmetic.
    """
    free: list[torch.Tensor] = _thread_cache.__dict__.setdefault("free", [])
    needed = rows * columns * dtype.itemsize
    buffer = free.pop() if free else torch.empty(0, dtype=torch.uint8)
    if len(buffer) < needed:
        buffer = torch.empty(needed, dtype=torch.uint8)
    yield buffer[:needed].view(dtype).view(rows, columns)
    free.append(buffer)


def refuse_overflow(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """Check `after`, which is `before` rounded to a narrower dtype.

    Raises UserError if a finite value became infinite, or if `after` contains a NaN.
    """
    if math.isfinite(after.sum()):  # one pass; a sum that is not finite does not prove an overflow
        return
    dtype = str(after.dtype).removeprefix("torch.")
    if nans := int(torch.isnan(after).sum()):
        raise UserError(f"{name} contains {nans} NaN; a model with NaN is not exported")
    if overflows := int((torch.isinf(after) & torch.isfinite(before)).sum()):
        raise UserError(
            f"{name}: {overflows} value(s) of up to "
            f"{before[torch.isfinite(before)].abs().max():.4g} do not fit {dtype}; choose --dtype "
            "bf16 or fp32"
        )
