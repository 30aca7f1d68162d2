"""Collectives of small Python values, and of failures: what fails on one rank fails on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from launcher.errors import UserError

T = TypeVar("T")


def on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `action` on every rank of `group` and return its result. Collective.

    If it raises on some ranks, all ranks raise UserError with the cause on the first of them, so
    that no rank waits in the next collective.
    """
    result, problem, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        problem, cause = str(error) if isinstance(error, UserError) else root_cause(error), error
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    for rank, message in enumerate(problems):
        if message is not None:
            raise UserError(f"rank {rank}: {message}") from cause
    return result  # type: ignore[return-value]


def any_rank(value: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether `value` is true on any rank. Collective."""
    count = torch.tensor(int(value))
    dist.all_reduce(count, group=group)
    return bool(count)


def max_over_ranks(values: list[float]) -> list[float]:
    """The elementwise maximum of `values` over all ranks. Collective."""
    maximum = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return maximum.tolist()


def first_not_none(value: T | None) -> T | None:
    """The `value` of the first rank that has one; None if no rank has. Collective."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return next((each for each in values if each is not None), None)


def in_parts(count: int, compute: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """The values of `count` items, on every rank. Collective.

    Each rank calls `compute(begin, count)` for its part of the items. It returns a value for each
    of them, in order along dim 0, on the device of the training.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    share = -(-count // ranks)
    begin = min(share * rank, count)
    own = compute(begin, min(share, count - begin))
    padded = own.new_zeros((share, *own.shape[1:]))
    padded[: len(own)] = own
    values = own.new_empty((share * ranks, *own.shape[1:]))
    dist.all_gather_into_tensor(values, padded)
    return values[:count]


def root_cause(error: BaseException) -> str:
    """Type and message of the first error in a chain. DCP keeps each rank's error in `failures`."""
    while True:
        failures = getattr(error, "failures", None)
        if failures:
            error = next(iter(failures.values()))[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            return f"{type(error).__name__}: {error}"
