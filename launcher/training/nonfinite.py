"""Find where values that are not finite come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from launcher.data.loader import StepBatch
from launcher.training.loss import token_loss


@torch.no_grad()
def first_bad_module(model: nn.Module, step_batch: StepBatch, device: torch.device) -> str:
    """Run this rank's rows of `step_batch` again, and name the first module whose output is not
    finite, as a sentence. If there is none, the gradient was not finite. Collective."""
    bad_modules: list[str] = []

    def make_hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check_output(_: nn.Module, __: Any, output: Any) -> None:
            if not bad_modules and torch.is_tensor(output) and not torch.isfinite(output).all():
                bad_modules.append(name)

        return check_output

    leaves = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children())]
    hooks = [module.register_forward_hook(make_hook(name)) for name, module in leaves]
    try:
        for batch in step_batch.micro_batches:
            token_loss(model, batch.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    if not bad_modules:
        return "Every output is finite, but a gradient is not. "
    return f"The first module with an output that is not finite is {bad_modules[0]}. "
