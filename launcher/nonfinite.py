"""Where values that are not finite come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.data.loader import Window
from launcher.loss import token_loss


@torch.no_grad()
def first_bad_module(model: nn.Module, window: Window, device: torch.device) -> str:
    """A sentence with the first module whose output is not finite for the rows of `window`, as this
    rank has them; or that only a gradient is not. Collective."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not found and torch.is_tensor(output) and not torch.isfinite(output).all():
                found.append(name)

        return look

    leaves = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        for batch in window.micro_batches:
            token_loss(model, batch.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return "Every output is finite, a gradient was not. "
    return f"The first module with an output that is not finite is {found[0]}. "
