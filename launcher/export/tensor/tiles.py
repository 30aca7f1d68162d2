"""How much of a tensor is in memory at a time, and what is looked at while it is."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from launcher.errors import UserError

THINNEST_TILE = 64  # rows; a product of fewer may round differently from the whole product
SPAN = 1 << 18  # elements

_own = threading.local()


def tiles(rows: int, row_bytes: int, nbytes: int) -> list[tuple[int, int]]:
    """Ranges of about `nbytes` each, none thinner than THINNEST_TILE unless all rows are."""
    return _ranges(rows, nbytes // max(1, row_bytes))


def spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges of about SPAN elements, in which arithmetic stays in the processor's cache."""
    return _ranges(rows, SPAN // max(1, columns))


def _ranges(rows: int, step: int) -> list[tuple[int, int]]:
    starts = list(range(0, rows, max(THINNEST_TILE, step)))
    if len(starts) > 1 and rows - starts[-1] < THINNEST_TILE:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows], strict=True)) if starts else []


@contextmanager
def scratch(dtype: torch.dtype, rows: int, columns: int) -> Iterator[torch.Tensor]:
    """An uninitialised [rows, columns], this thread's until the block ends and then used again:
    the page faults of fresh memory cost more than the arithmetic done in it."""
    free: list[torch.Tensor] = _own.__dict__.setdefault("free", [])
    needed = rows * columns * dtype.itemsize
    room = free.pop() if free else torch.empty(0, dtype=torch.uint8)
    if len(room) < needed:
        room = torch.empty(needed, dtype=torch.uint8)
    yield room[:needed].view(dtype).view(rows, columns)
    free.append(room)


def refuse_overflow(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """Raises UserError when rounding `before` to `after` lost a finite value, or left a NaN."""
    if math.isfinite(after.sum()):  # one pass; a sum that is not finite proves nothing
        return
    dtype = str(after.dtype).removeprefix("torch.")
    if nans := int(torch.isnan(after).sum()):
        raise UserError(f"{name} holds {nans} NaN; a model that holds any is not exported")
    if lost := int((torch.isinf(after) & torch.isfinite(before)).sum()):
        raise UserError(
            f"{name}: {lost} value(s) of up to {before[torch.isfinite(before)].abs().max():.4g} "
            f"do not fit {dtype}; choose --dtype bf16 or fp32"
        )
