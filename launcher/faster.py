"""`training.compile=auto`: compiled layers, or layers as they are, whichever is faster here."""

from __future__ import annotations

import time
from statistics import median

import torch

from launcher.checkpoint import rng
from launcher.data.batch import MicroBatch
from launcher.distributed.together import slowest
from launcher.loss import token_loss
from launcher.model.compiled import use_compiled
from launcher.strategy import Strategy

WARM_UP, ROUNDS = 2, 3  # compiling takes place in the warm-up


def keep_faster(strategy: Strategy, batch: MicroBatch, device: torch.device) -> str:
    """Time forward and backward of `batch` both ways in turn, and keep the faster by the slowest
    rank's medians; both in words. Collective. Weights, gradients and random states are as before.
    """
    before, batch = rng.capture(device), batch.to(device)
    strategy.model.train()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(WARM_UP + ROUNDS):
        for used, times in seconds.items():
            use_compiled(strategy.model, used)
            times.append(_seconds(strategy, batch, device))
    rng.restore(before, device)
    eager, compiled = slowest([median(times[WARM_UP:]) for times in seconds.values()])
    use_compiled(strategy.model, compiled < eager)
    rows, length = batch.input_ids.shape
    return (
        f"{'on' if compiled < eager else 'off'}, for forward and backward of {rows} × {length} "
        f"tokens take {compiled:.4f} s compiled and {eager:.4f} s as they are"
    )


def _seconds(strategy: Strategy, batch: MicroBatch, device: torch.device) -> float:
    strategy.accumulate(last=True)
    _wait(device)
    began = time.perf_counter()
    strategy.backward(token_loss(strategy.model, batch) / len(batch.target_ids))
    _wait(device)
    took = time.perf_counter() - began
    strategy.forget()
    return took


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
