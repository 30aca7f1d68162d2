"""Linear layers whose weight can be freed between forward and backward.

Autograd keeps for backward what a product was computed with. `nn.Linear` multiplies with a view of
its weight, so that under ZeRO-3, which gives a gathered parameter's memory back by pointing it
elsewhere, every gathered weight would live on until its backward: the whole model on every rank.
Here the parameter itself is kept, which is whole again when backward comes to it. (DeepSpeed has
the same, `zero/linear.py`, and puts it in place of torch's for the whole process.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


def free_linears(model: nn.Module) -> None:
    """Give the plain linear layers of `model` such a forward; results are the same to the bit."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FreedLinear


class FreedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → x Wᵀ + b [..., out]."""
        y: torch.Tensor = _Linear.apply(x, self.weight, self.bias)
        return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            gradient @ weight if ctx.needs_input_grad[0] else None,
            flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None,
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )
