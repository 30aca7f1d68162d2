"""Loads the batches of the next step while the current step computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from launcher.data.loader import Loader, StepBatch
from launcher.io.current_device import use_device


class Prefetcher:
    """Runs a loader one step ahead, in a thread. Most of its work is in numpy and the tokenizer,
    which release the GIL."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        """`device` will train on the batches; for a GPU they are pinned."""
        self.loader = loader
        self.pin_memory = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "data", use_device, (device,))
        self._next: tuple[int, Future[StepBatch]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def step_batch(self, step: int) -> StepBatch:
        """The same as `Loader.step_batch`; also starts loading the step after it."""
        pending = self._next
        future = pending[1] if pending and pending[0] == step else self._submit(step)
        step_batch = future.result()
        self._next = (step + 1, self._submit(step + 1))
        return step_batch

    def _submit(self, step: int) -> Future[StepBatch]:
        return self._thread.submit(self._load, step)

    def _load(self, step: int) -> StepBatch:
        step_batch = self.loader.step_batch(step)
        if not self.pin_memory:
            return step_batch
        pinned = [batch.pin_memory() for batch in step_batch.micro_batches]
        return replace(step_batch, micro_batches=pinned)
