"""The steps that all ranks take together: how large each one is, and whether there is another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from launcher.data.loader import StepBatch
from launcher.run import heartbeat
from launcher.run.heartbeat import TRAINING, Marks
from launcher.strategy.base import PendingSum
from launcher.training.throughput import Work


@dataclass
class AgreedSteps:
    """The batches of `steps`, each with its size on all ranks, until a rank wants to end.

    A sum over hundreds of ranks takes tens of milliseconds. So the counts of a step travel while
    the step before it computes, and with them the wish of a rank to end: all ranks then end after
    the same step, at most one step after the wish.
    """

    load: Callable[[int], StepBatch]
    steps: range
    start_sum: Callable[[torch.Tensor], PendingSum]
    wants_to_end: Callable[[], bool]
    marks: Marks = TRAINING
    ended: bool = False  # before the last step. May be set between two steps, on all ranks alike

    def __iter__(self) -> Iterator[tuple[StepBatch, Work]]:
        upcoming: tuple[StepBatch, PendingSum] | None = None
        for step in self.steps:
            if self.ended:
                break
            step_batch, total = upcoming or self._announce(step)
            upcoming = self._announce(step + 1) if step + 1 in self.steps else None
            heartbeat.enter(self.marks.agree, step + 1)
            *counts, any_ends = total().tolist()
            self.ended = bool(any_ends)
            if not self.ended:
                heartbeat.enter(self.marks.compute, step + 1)
                yield step_batch, Work(*counts)
        if upcoming is not None:
            upcoming[1]()  # all ranks have started this sum, and complete it

    def _announce(self, step: int) -> tuple[StepBatch, PendingSum]:
        """Load a step, and start to sum its counts and the wishes to end before it."""
        heartbeat.enter(self.marks.load, step + 1)
        step_batch = self.load(step)
        wish = torch.tensor(int(self.wants_to_end()))
        return step_batch, self.start_sum(torch.stack([*step_batch.counts, wish]))
