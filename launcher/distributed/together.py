"""What fails on one rank fails on all, with the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from launcher.errors import UserError

T = TypeVar("T")


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do `action` on every rank of `group` and return its result. Collective.

    Where it raises on some ranks, all raise UserError with the first such rank's cause: nobody is
    left waiting in the next collective.
    """
    result, problem, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        problem, cause = str(error) if isinstance(error, UserError) else innermost(error), error
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    for rank, each in enumerate(problems):
        if each is not None:
            raise UserError(f"rank {rank}: {each}") from cause
    return result  # type: ignore[return-value]


def any_rank(here: bool) -> bool:
    """Whether it is so on any rank. Collective."""
    count = torch.tensor(int(here))
    dist.all_reduce(count)
    return bool(count)


def slowest(seconds: list[float]) -> list[float]:
    """The most that any rank has, at each place. Collective."""
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.tolist()


def first_known(here: T | None) -> T | None:
    """What the first rank that knows it has. Collective."""
    found: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, here)
    return next((each for each in found if each is not None), None)


def innermost(error: BaseException) -> str:
    """The cause behind a chain of wrappers; DCP keeps one of each rank in `failures`."""
    while True:
        failures = getattr(error, "failures", None)
        if failures:
            error = next(iter(failures.values()))[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            return f"{type(error).__name__}: {error}"
