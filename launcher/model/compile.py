"""Regional compilation: the forward of each decoder layer is one compiled function.

The layers have the same structure, so one of them is compiled and all run the compiled code. The
modules and the hooks by which strategies gather and free weights are not compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from launcher.model.layers import decoder_layers

RECOMPILE_LIMIT = 32  # torch's default is 8


class CompiledForward:
    """The forward of a layer: compiled if `enabled` and gradients are on, otherwise eager."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.enabled = True
        self._eager = forward
        self._compiled = torch.compile(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Evaluation would need another compilation for each of its shapes.
        forward = self._compiled if self.enabled and torch.is_grad_enabled() else self._eager
        return forward(*args, **kwargs)


def compile_layers(model: nn.Module) -> None:
    """Compile the decoder layers. Call it after activation checkpointing and before the strategy.

    Compilation happens in the first forwards: once for each shape until torch sees that shapes
    change, then once for all shapes.
    """
    # Layers of different kinds, and the first layer if its input needs no gradient, are compiled
    # separately; each for one row and for several rows. Past the limit, torch would only warn and
    # run them eagerly.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for layer in decoder_layers(model):
        layer.forward = CompiledForward(layer.forward)


def set_compiled(model: nn.Module, enabled: bool) -> None:
    """Whether the compiled layers of `model` run compiled or eagerly."""
    for forward in compiled_forwards(model):
        forward.enabled = enabled


def compiled_forwards(model: nn.Module) -> list[CompiledForward]:
    """The forwards of all compiled layers, in order. (Strategies change the classes of layers.)"""
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, CompiledForward)]
