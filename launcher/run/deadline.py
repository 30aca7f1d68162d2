"""When the time of a job is over, and whether two steps and a save still fit before that.

This needs no signal. Slurm's signal may come half a minute early or late, and one that comes before
Python handles signals is lost.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launcher.folders.json_file import FINITE, DamagedFile, or_null, read_fields

SPARE_SECONDS = 10.0


class Deadline:
    """The end of a job, checked once per step.

    The longest time between two checks covers the longest step, evaluation or blocking save so far.
    Three times that time must remain: for the step before the next check, for one after it, because
    ranks agree on the end of training while a step computes, and for the last save.
    """

    def __init__(self, end: float | None) -> None:
        """`end`: seconds since 1970; None: no time limit."""
        self._end = end
        self._last_check: float | None = None
        self._longest = 0.0

    @classmethod
    def from_job_file(cls, job: Path) -> Deadline | None:
        """The deadline of the Slurm job that `job` (job.json) describes; None without that file.

        If the file is damaged, only Slurm's signal tells when to stop.
        """
        if not job.is_file():
            return None
        try:
            return cls(read_fields(job, end=or_null(FINITE))["end"])
        except DamagedFile as error:
            print(f"{error}; only Slurm's signal stops this attempt in time", file=sys.stderr)
            return cls(None)

    def reset(self) -> None:
        """Forget the times so far. Training starts now: what came before was not a step."""
        self._last_check = None
        self._longest = 0.0

    def is_near(self) -> bool:
        """Whether there is no longer time for two steps and a save. Call it once per step."""
        now = time.monotonic()
        if self._last_check is not None:
            self._longest = max(self._longest, now - self._last_check)
        self._last_check = now
        return self._end is not None and self._end - time.time() < (
            3 * self._longest + SPARE_SECONDS
        )
