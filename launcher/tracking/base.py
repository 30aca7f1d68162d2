"""What the training loop reports, and the interface of what receives it."""

from __future__ import annotations

from typing import Any, Protocol

Record = dict[str, Any]  # one line of metrics.jsonl


class Observer(Protocol):
    """Follows a run between steps, on rank 0."""

    def start(self, done_steps: int, total_steps: int) -> None:
        """Before the first step: `done_steps` were done by earlier attempts."""

    def log(self, records: list[Record]) -> None:
        """The records of the steps since the last call, or of an evaluation."""

    def finish(self) -> None:
        """After the last step and its checkpoint."""
