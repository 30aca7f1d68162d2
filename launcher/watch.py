"""The evaluation losses of a run: which is the best, and whether they have stopped falling."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Watch:
    """Sees every evaluation of the schedule, in order and with the same loss on all ranks.

    An improvement is a loss below the last improvement by more than `threshold`; training has
    stalled after `patience` evaluations without one (None: never).
    """

    patience: int | None = None
    threshold: float = 0.0
    seen: Seen = field(default_factory=lambda: Seen())

    def add(self, step: int, loss: float) -> None:
        seen = self.seen
        seen.last_step = step
        seen.stalled += 1
        if not math.isfinite(loss):
            return
        if seen.improved_to is None or loss < seen.improved_to - self.threshold:
            seen.improved_to, seen.stalled = loss, 0
        if seen.lowest is None or loss < seen.lowest:
            seen.lowest, seen.lowest_step = loss, step

    def has_seen(self, step: int) -> bool:
        return self.seen.last_step >= step

    def is_lowest(self, step: int) -> bool:
        """Whether no evaluation was better than that of `step`."""
        return self.seen.lowest_step == step

    def stalled(self) -> bool:
        return self.patience is not None and self.seen.stalled >= self.patience

    def reason(self) -> str | None:
        """Why training ends, None where it has not stalled."""
        if not self.stalled():
            return None
        lowest = "none is finite"
        if self.seen.lowest is not None:
            lowest = f"the lowest is {self.seen.lowest:.4f}, after step {self.seen.lowest_step}"
        return (
            f"training.early_stopping_patience={self.patience}: eval_loss has not improved in "
            f"{self.seen.stalled} evaluation(s); {lowest}"
        )

    def state(self) -> dict[str, Any]:
        return asdict(self.seen)

    def go_on_from(self, state: dict[str, Any]) -> None:
        self.seen = Seen(**state)


@dataclass
class Seen:
    """What is kept in checkpoints."""

    last_step: int = 0
    improved_to: float | None = None
    stalled: int = 0  # evaluations since
    lowest: float | None = None
    lowest_step: int = 0
