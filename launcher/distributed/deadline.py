"""When a job's time is up, and whether there is still time for a step and a save.

No signal is needed for it: Slurm's comes early or late by half a minute, and one that comes before
Python listens is lost.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

SPARE_SECONDS = 10.0


class Deadline:
    """Looked at once a step. The longest time between two looks is what a step, an evaluation or a
    save in the foreground has taken; twice that must be left, for a step and the last save."""

    def __init__(self, end: float | None) -> None:
        """`end`: seconds since 1970; None: never."""
        self._end = end
        self._looked: float | None = None
        self._longest = 0.0

    @classmethod
    def of(cls, job: Path) -> Deadline | None:
        """That of the Slurm job that `job.json` describes; None where no job is."""
        if not job.is_file():
            return None
        return cls(json.loads(job.read_text(encoding="utf-8"))["end"])

    def begins(self) -> None:
        """Training does: what came before was no step."""
        self._looked = None
        self._longest = 0.0

    def is_near(self) -> bool:
        now = time.monotonic()
        if self._looked is not None:
            self._longest = max(self._longest, now - self._looked)
        self._looked = now
        return self._end is not None and self._end - time.time() < (
            2 * self._longest + SPARE_SECONDS
        )
