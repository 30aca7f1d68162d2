"""How far it is: a bar in a terminal, a line now and then elsewhere. On stderr."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

EVERY_SECONDS = 15.0


class Progress:
    """Bytes done of `total`, with rate and time left. `advance` may come from any thread."""

    every_seconds = EVERY_SECONDS  # between lines; of the whole process

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._began = self._told = time.monotonic()
        self._lock = threading.Lock()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=what)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            if self._bar is not None:
                self._bar.update(nbytes)
            elif (now := time.monotonic()) - self._told >= self.every_seconds:
                self._told = now
                rate = self.done / max(1e-9, self.seconds)
                print(
                    f"{self.what} {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, "
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
