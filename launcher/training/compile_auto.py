"""`training.compile=auto`: use compiled layers if they are faster on this machine."""

from __future__ import annotations

import time
from statistics import median

import torch

from launcher.data.collate import MicroBatch
from launcher.distributed.collectives import max_over_ranks
from launcher.model.compile import set_compiled
from launcher.strategy import Strategy
from launcher.training import rng
from launcher.training.loss import token_loss

WARM_UP, ROUNDS = 2, 3  # layers are compiled during the warm-up


def choose_compile(strategy: Strategy, batch: MicroBatch, device: torch.device) -> str:
    """Time forward and backward of `batch` with and without compilation, alternating, and keep the
    faster choice. A choice counts with the median of its slowest rank. Returns both times as text.
    Collective.

    Weights, gradients and random states do not change.
    """
    rng_states, batch = rng.capture(device), batch.to(device)
    strategy.model.train()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(WARM_UP + ROUNDS):
        for is_compiled, times in seconds.items():
            set_compiled(strategy.model, is_compiled)
            times.append(_time_pass(strategy, batch, device))
    rng.restore(rng_states, device)
    eager, compiled = max_over_ranks([median(times[WARM_UP:]) for times in seconds.values()])
    set_compiled(strategy.model, compiled < eager)
    rows, length = batch.input_ids.shape
    return (
        f"{'on' if compiled < eager else 'off'}: forward and backward of {rows} × {length} tokens "
        f"take {compiled:.4f} s compiled and {eager:.4f} s not compiled"
    )


def _time_pass(strategy: Strategy, batch: MicroBatch, device: torch.device) -> float:
    """Seconds of one forward and backward."""
    strategy.set_last_micro_batch(last=True)
    _synchronize(device)
    start = time.perf_counter()
    strategy.backward(token_loss(strategy.model, batch) / len(batch.target_ids))
    _synchronize(device)
    seconds = time.perf_counter() - start
    strategy.zero_grad()
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
