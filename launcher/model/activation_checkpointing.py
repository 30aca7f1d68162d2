"""Activation checkpointing: layers that keep no activations and recompute them in backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.model.layers import decoder_layers


def checkpoint_activations(model: nn.Module, choice: str) -> str:
    """Change `model` by `training.activation_checkpointing`, and return a description for the log.

    `choice` is off, full, or N for the first of every N decoder layers. Losses and gradients stay
    the same to the bit: dropout is drawn again from the same random state. Call it before the
    strategy shards the model, so that a layer is gathered once in forward and once in backward.
    """
    if choice == "off":
        return "all kept"
    layers = decoder_layers(model)
    chosen = layers[:: 1 if choice == "full" else int(choice)]
    for layer in chosen:
        layer.forward = _recompute_in_backward(layer, layer.forward)
    return f"recomputed in backward for {len(chosen)} of {len(layers)} layers"


def _recompute_in_backward(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

    return run
