"""What a method is to the rest of the house."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class Method(Protocol):
    """Chooses the parameters to train and writes the trained part."""

    adapter: bool  # True: only the trained parameters are kept, as a PEFT adapter folder

    def __init__(self, config: Any) -> None: ...

    def prepare(self, model: Any, seed: int) -> Any:
        """Set `requires_grad` everywhere and add what is to be trained.

        Parameters of the model may be on meta. What the method adds must be real and the same on
        every rank: it is drawn from `seed`.
        """

    def write(self, model: Any, trained: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the gathered trained parameters (name in `model` → whole fp32 tensor)."""

    def read(self, model: Any, folder: Path) -> dict[str, torch.Tensor]:
        """What `write` wrote: name in `model` → whole fp32 tensor."""


def describe(model: nn.Module) -> str:
    """Counts of trained and frozen parameters in words."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    tensors = sum(1 for p in model.parameters() if p.requires_grad)
    return (
        f"{trained:,} of {total:,} parameters are trained "
        f"({100 * trained / total:.2f} %, {tensors} tensors)"
    )
