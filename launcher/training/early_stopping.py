"""The evaluation losses of a run: which is the lowest, and whether they have stopped improving."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EvaluationHistory:
    """What is known of the evaluations until now; saved in checkpoints."""

    last_step: int = 0
    improved_to: float | None = None  # the loss of the last improvement
    stalled: int = 0  # evaluations since the last improvement
    lowest: float | None = None
    lowest_step: int = 0


@dataclass
class EarlyStopping:
    """Decides whether training has stalled.

    Receives all scheduled evaluations in order, with the same loss on all ranks. An improvement is
    a loss that is lower than the last improvement by more than `threshold`. Training has stalled
    after `patience` evaluations without an improvement (None: never).
    """

    patience: int | None = None
    threshold: float = 0.0
    history: EvaluationHistory = field(default_factory=EvaluationHistory)

    def add(self, step: int, loss: float) -> None:
        """Add the evaluation after `step`. A loss that is not finite is not an improvement."""
        history = self.history
        history.last_step = step
        history.stalled += 1
        if not math.isfinite(loss):
            return
        if history.improved_to is None or loss < history.improved_to - self.threshold:
            history.improved_to, history.stalled = loss, 0
        if history.lowest is None or loss < history.lowest:
            history.lowest, history.lowest_step = loss, step

    def has_evaluated(self, step: int) -> bool:
        """Whether the evaluation after `step` was added."""
        return self.history.last_step >= step

    def is_lowest(self, step: int) -> bool:
        """Whether the evaluation after `step` has the lowest loss until now."""
        return self.history.lowest_step == step

    def has_stalled(self) -> bool:
        """Whether training should end."""
        return self.patience is not None and self.history.stalled >= self.patience

    def reason(self) -> str | None:
        """Why training ends; None if it has not stalled."""
        if not self.has_stalled():
            return None
        history, lowest = self.history, "none is finite"
        if history.lowest is not None:
            lowest = f"the lowest is {history.lowest:.4f}, after step {history.lowest_step}"
        return (
            f"training.early_stopping_patience={self.patience}: eval_loss has not improved in "
            f"{history.stalled} evaluation(s); {lowest}"
        )

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint saves."""
        return asdict(self.history)

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.history = EvaluationHistory(**state)
