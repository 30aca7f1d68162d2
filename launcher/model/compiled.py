"""Each decoder layer's forward as one compiled function: regional compilation.

Layers are alike, so that one of them is compiled and all run it. The module and its hooks, by which
strategies gather and free weights, stay outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from launcher.model.layers import decoder_layers

RECOMPILE_LIMIT = 32  # torch's own is 8


class Compiled:
    """A layer's forward, compiled where it is trained, or as it was."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.used = True
        self._eager = forward
        self._compiled = torch.compile(forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Evaluation would be compiled once more, for each of its shapes.
        forward = self._compiled if self.used and torch.is_grad_enabled() else self._eager
        return forward(*args, **kwargs)


def compile_layers(model: nn.Module) -> None:
    """Call it after activation checkpointing, and before the strategy. Compiling takes place in the
    first forwards: each shape until they are seen to change, and then for all."""
    # Twice where layers differ in kind, or the first in that its input needs no gradient; each for
    # one row and several. Past the limit torch would run them as they are, with a warning.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for layer in decoder_layers(model):
        layer.forward = Compiled(layer.forward)


def use_compiled(model: nn.Module, used: bool) -> None:
    """Whether compiled layers of `model` run compiled."""
    for forward in compiled_forwards(model):
        forward.used = used


def compiled_forwards(model: nn.Module) -> list[Compiled]:
    """Of all compiled layers, in order. (Strategies give layers other class names.)"""
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, Compiled)]
