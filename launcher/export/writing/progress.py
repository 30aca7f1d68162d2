"""Progress on stderr: a bar in a terminal, otherwise a line from time to time."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

EVERY_SECONDS = 15.0


class Progress:
    """Bytes or tokens done of `total`, with rate and remaining time. `advance` can be called from
    any thread."""

    every_seconds = EVERY_SECONDS  # between lines, for the whole process

    def __init__(self, description: str, total: int, unit: str = "B") -> None:
        """`unit`: B for bytes, or the name of what is counted, in the plural."""
        self.description, self.total, self.unit, self.done = description, total, unit, 0
        self._started = self._last_line = time.monotonic()
        self._lock = threading.Lock()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit=unit, unit_scale=True, desc=description)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def advance(self, count: int) -> None:
        """Add `count` to what is done."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(count)
            elif (now := time.monotonic()) - self._last_line >= self.every_seconds:
                self._last_line = now
                print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = self.done / max(1e-9, self.seconds)
        left = f"{(self.total - self.done) / max(1e-9, rate):.0f} s left"
        if self.unit != "B":
            done = f"{self.done:,} of {self.total:,} {self.unit}, {rate:,.0f} {self.unit}/s"
        else:
            done = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s"
        return f"{self.description} {done}, {left}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
