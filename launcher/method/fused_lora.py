"""LoRA without extra passes over the layer's output.

PEFT computes y = Wx + s·B(Ax) in three operations as wide as the output: B(Ax), the product with s,
and the sum. Here the product with B adds its scaled result to Wx directly. The layers remain PEFT
layers of a different class, so saving, merging and loading work as before. Each weight is still
used by its own module, so the hooks that gather weights still run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.method.peft_tensors import ADAPTER_NAME
from launcher.model.peft import PeftLinear


def fuse_adapters(model: nn.Module) -> int:
    """Change the class of the plain LoRA layers of `model`. Returns their number. Layers with
    dropout, a bias or a variant (DoRA) are left to PEFT."""
    modules: list[Any] = list(model.modules())
    plain_layers = [m for m in modules if type(m) is PeftLinear and _is_plain(m)]
    for layer in plain_layers:
        layer.__class__ = FusedLoraLinear
        layer.lora_B[ADAPTER_NAME].__class__ = AddmmLinear
    return len(plain_layers)


def _is_plain(layer: PeftLinear) -> bool:
    if set(layer.lora_A) != {ADAPTER_NAME} or layer.lora_variant:
        return False
    lora_b, dropout = layer.lora_B[ADAPTER_NAME], layer.lora_dropout[ADAPTER_NAME]
    return type(lora_b) is nn.Linear and lora_b.bias is None and isinstance(dropout, nn.Identity)


class AddmmLinear(nn.Linear):
    """A linear layer that can add its scaled result to another tensor."""

    def forward(
        self, x: torch.Tensor, addend: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        """x [n, in] → x Wᵀ [n, out], or addend + scale · x Wᵀ, in place if possible."""
        if addend is None:
            return super().forward(x)
        # DeepSpeed's hooks return views, and autograd does not allow changing those in place.
        if torch.compiler.is_compiling() or addend._is_view():
            return torch.addmm(addend, x, self.weight.T, alpha=scale)
        return addend.addmm_(x, self.weight.T, alpha=scale)


class FusedLoraLinear(PeftLinear):
    """PEFT's LoRA layer with a fused forward. Special cases are left to PEFT's forward."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        lora_a = self.lora_A[ADAPTER_NAME]
        is_special = args or kwargs or self.disable_adapters or self.merged
        is_special = is_special or self.active_adapters != [ADAPTER_NAME]
        if is_special or x.dtype != lora_a.weight.dtype:
            y: torch.Tensor = super().forward(x, *args, **kwargs)
            return y
        x_2d = x.flatten(0, -2)
        y_2d: torch.Tensor = self.lora_B[ADAPTER_NAME](
            lora_a(x_2d), self.base_layer(x_2d), self.scaling[ADAPTER_NAME]
        )
        return y_2d.view(*x.shape[:-1], -1)
