"""What a model does with its logits behind the head: a factor, and a soft cap.

A chunked head does the same to each chunk. It finds out by numbers, not by the names of settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LARGE, SMALL = 1e6, 1e-3  # logits: far above any cap, and far below


@dataclass(frozen=True)
class LogitTransform:
    """`cap · tanh(scale · logits / cap)`; without a cap, `scale · logits`."""

    scale: float
    cap: float | None

    def __str__(self) -> str:
        cap = "" if self.cap is None else f", capped at {self.cap:g}"
        return f"logits times {self.scale:g}{cap}"

    def apply_(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Change `logits` in place; returns the derivative at each of them, None if it is `scale`
        everywhere."""
        logits.mul_(self.scale)
        if self.cap is None:
            return None
        bounded = logits.div_(self.cap).tanh_()
        slope = (1 - bounded.square()).mul_(self.scale)
        bounded.mul_(self.cap)
        return slope


def find_transform(behind_head: Callable[[torch.Tensor], Any], size: int) -> LogitTransform | None:
    """The transform that a model computes, None if it is another.

    `behind_head`: a forward of the model in which the head returns its argument. `size`: of the
    vocabulary. Raises what the model raises.
    """
    logits = torch.linspace(-60, 60, 2 * size, dtype=torch.float64).view(1, 2, size)
    logits[0, 0, 0], logits[0, 0, 1] = LARGE, SMALL
    found = behind_head(logits.clone())
    if not isinstance(found, torch.Tensor) or found.shape != logits.shape:
        return None
    found = found.double()
    highest, lowest = found[0, 0, 0].item(), found[0, 0, 1].item()
    is_linear = abs(highest) > 0.5 * abs(lowest) * LARGE / SMALL
    cap = None if is_linear else highest
    scale = lowest / SMALL if cap is None else cap * math.atanh(lowest / cap) / SMALL
    transform = LogitTransform(scale, cap)
    expected = logits.clone()
    transform.apply_(expected)
    return transform if torch.allclose(found, expected, rtol=1e-5, atol=1e-9) else None


class PassBy(torch.autograd.Function):
    """The loss that the head has summed, instead of what the model makes of it.

    The model's output gets a gradient of zero, so that the hooks behind the head still run.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(output)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (output,) = ctx.saved_tensors
        return torch.zeros_like(output), grad
