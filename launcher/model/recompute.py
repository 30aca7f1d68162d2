"""Keep fewer activations: what a layer has computed is computed again when backward needs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.model.layers import decoder_layers


def recompute_activations(model: nn.Module, choice: str) -> str:
    """Change `model` by `training.activation_checkpointing`: off, full, or N for the first of every
    N decoder layers. Returns what was done in words.

    Losses and gradients stay the same to the bit: dropout is drawn again from the same state.
    Call it before the strategy shards: a layer is gathered once for forward and once for backward.
    """
    if choice == "off":
        return "all are kept"
    layers = decoder_layers(model)
    chosen = layers[:: 1 if choice == "full" else int(choice)]
    for layer in chosen:
        layer.forward = _recomputed(layer, layer.forward)
    return f"those of {len(chosen)} of {len(layers)} layers are computed again in backward"


def _recomputed(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

    return run
