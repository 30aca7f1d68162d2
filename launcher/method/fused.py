"""LoRA without passes over the layer's output.

PEFT's y = Wx + s·B(Ax) writes B(Ax), multiplies it and adds it: three operations as wide as the
output. Here the multiplication by B adds its scaled result to Wx. The layers stay PEFT's, of
another class: saving, merging and loading do not see it, and weights are used by their own modules,
whose hooks gather them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.method.lora import ADAPTER
from launcher.model.peft import PeftLinear


def fuse_adapters(model: nn.Module) -> int:
    """Change the plain LoRA layers of `model`, and return how many there are. What has dropout,
    bias or a variant (DoRA) stays as PEFT computes it."""
    every: list[Any] = list(model.modules())
    plain = [each for each in every if type(each) is PeftLinear and _is_plain(each)]
    for layer in plain:
        layer.__class__ = FusedLinear
        layer.lora_B[ADAPTER].__class__ = AddingLinear
    return len(plain)


def _is_plain(layer: Any) -> bool:
    if set(layer.lora_A) != {ADAPTER} or layer.lora_variant:
        return False
    right, dropout = layer.lora_B[ADAPTER], layer.lora_dropout[ADAPTER]
    return type(right) is nn.Linear and right.bias is None and isinstance(dropout, nn.Identity)


class AddingLinear(nn.Linear):
    def forward(
        self, x: torch.Tensor, onto: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        """x [n, in] → x Wᵀ [n, out], or onto + scale · x Wᵀ, in `onto` where it can be."""
        if onto is None:
            return super().forward(x)
        # DeepSpeed's hooks return views, which autograd does not let be changed.
        if torch.compiler.is_compiling() or onto._is_view():
            return torch.addmm(onto, x, self.weight.T, alpha=scale)
        return onto.addmm_(x, self.weight.T, alpha=scale)


class FusedLinear(PeftLinear):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        left = self.lora_A[ADAPTER]
        others = args or kwargs or self.disable_adapters or self.merged
        if others or self.active_adapters != [ADAPTER] or x.dtype != left.weight.dtype:
            found: torch.Tensor = super().forward(x, *args, **kwargs)
            return found
        flat = x.flatten(0, -2)
        added: torch.Tensor = self.lora_B[ADAPTER](
            left(flat), self.base_layer(flat), self.scaling[ADAPTER]
        )
        return added.view(*x.shape[:-1], -1)
