"""Values that the page keeps: for some seconds, or the last ones. Imports no torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")


@dataclass
class CachedValue(Generic[T]):
    """A value that a background thread refreshes once it is older than `seconds`.

    Only a caller that finds no value yet waits for it, at most `patience` seconds.
    """

    fetch: Callable[[], T]
    seconds: float
    patience: float = 1.0
    _value: T | None = None
    _expires: float = 0.0
    _thread: threading.Thread | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self) -> T | None:
        """The latest value, which may be out of date; None if there is no value yet."""
        with self._lock:
            is_refreshing = self._thread is not None and self._thread.is_alive()
            if time.monotonic() > self._expires and not is_refreshing:
                self._thread = threading.Thread(target=self._refresh, daemon=True)
                self._thread.start()
            thread = self._thread
        if self._value is None and thread:
            thread.join(self.patience)
        return self._value

    def _refresh(self) -> None:
        value = self.fetch()
        self._value, self._expires = value, time.monotonic() + self.seconds


class LastUsed(Generic[K, T]):
    """The values that were used last; older ones are forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: dict[K, T] = {}

    def get(self, key: K) -> T | None:
        """The value, None if there is none or it was forgotten."""
        return self._values.get(key)

    def put(self, key: K, value: T) -> None:
        """Keep the value as the one that was used last."""
        self._values.pop(key, None)
        self._values[key] = value
        while len(self._values) > self._limit:
            del self._values[next(iter(self._values))]
