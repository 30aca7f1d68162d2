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
    """Bytes done of `total`, with rate and remaining time. `advance` can be called from any
    thread."""

    every_seconds = EVERY_SECONDS  # between lines, for the whole process

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self._started = self._last_line = time.monotonic()
        self._lock = threading.Lock()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=description)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def advance(self, nbytes: int) -> None:
        """Add `nbytes` to the bytes done."""
        with self._lock:
            self.done += nbytes
            if self._bar is not None:
                self._bar.update(nbytes)
            elif (now := time.monotonic()) - self._last_line >= self.every_seconds:
                self._last_line = now
                rate = self.done / max(1e-9, self.seconds)
                print(
                    f"{self.description} {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, "
                    f"{rate / 1e6:,.0f} MB/s, {(self.total - self.done) / rate:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

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
