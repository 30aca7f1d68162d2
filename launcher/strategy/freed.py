"""Weights that can be freed between forward and backward.

Autograd keeps for backward what a product was computed with, and that is often a view of a weight:
its transpose in a linear layer, one expert of many. Under ZeRO-3, which gives a gathered
parameter's memory back by pointing it elsewhere, such a view would hold the memory until its
backward: the whole model on every rank. Here the parameter itself is kept, which is whole again
when backward comes to it, and the view is made anew. (DeepSpeed puts a linear layer of its own in
place of torch's, `zero/linear.py`, and only where `zero.Init` builds the model.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


def keep_parameters(model: nn.Module) -> None:
    """Let what `model` computes keep its parameters for backward, not views of them; results are
    the same to the bit."""
    forward: Callable[..., Any] = model.forward

    @wraps(forward)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(_kept, _seen):
            return forward(*args, **kwargs)

    model.forward = keeping


@dataclass(frozen=True)
class _View:
    """A view of a parameter, of which it holds no memory."""

    of: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # from the parameter's first element


def _kept(tensor: torch.Tensor) -> torch.Tensor | _View:
    of = tensor._base
    if not isinstance(of, nn.Parameter):
        return tensor
    offset = int(tensor.storage_offset() - of.storage_offset())
    return _View(of, tensor.size(), tensor.stride(), offset)


def _seen(kept: torch.Tensor | _View) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    whole = kept.of.detach()
    return whole.as_strided(kept.size, kept.stride, whole.storage_offset() + kept.offset)
