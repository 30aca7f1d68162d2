"""How much memory a run needs, found out without a GPU and without weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What the fullest rank needs."""

    weights: int  # between steps: working weights, masters, an engine's buffers
    optimizer: int  # between steps: the optimizer's state
    activations: int  # kept for the backward of a micro-batch
    peak: int  # on the GPU, without what offloading has in host memory
    phase: str  # in which the peak is: loading, forward, backward or optimizer step
    host: int  # in host memory by offloading, gradients included
