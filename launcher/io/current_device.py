"""The GPU of a thread."""

from __future__ import annotations

import torch


def use_device(device: torch.device) -> None:
    """Make `device` the current GPU of this thread; nothing on the CPU.

    Every thread that touches CUDA calls it first: the current GPU of a new thread is number 0,
    where each rank would create a context of half a GB.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
