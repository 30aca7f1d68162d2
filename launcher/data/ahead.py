"""The next step's batches are made while this one computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from launcher.data.loader import Loader, Window


class Ahead:
    """A loader one step ahead. The work is numpy's and the tokenizer's, which let other threads
    run."""

    def __init__(self, loader: Loader, pin_memory: bool) -> None:
        self.loader = loader
        self.pin_memory = pin_memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._next: tuple[int, Future[Window]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def window(self, step: int) -> Window:
        """As the loader's, which says what of it is asked for."""
        ready = self._next
        future = ready[1] if ready and ready[0] == step else self._make(step)
        window = future.result()
        self._next = (step + 1, self._make(step + 1))
        return window

    def _make(self, step: int) -> Future[Window]:
        return self._thread.submit(self._window, step)

    def _window(self, step: int) -> Window:
        window = self.loader.window(step)
        if not self.pin_memory:
            return window
        pinned = [batch.pin_memory() for batch in window.micro_batches]
        return replace(window, micro_batches=pinned)
