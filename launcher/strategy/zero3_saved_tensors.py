"""Let ZeRO-3 free gathered weights between forward and backward.

Autograd saves the inputs of a matrix product for backward, often as views of a weight: the
transpose in a linear layer, or one expert of a stack. ZeRO-3 frees a gathered parameter by pointing
it to other memory. A saved view would keep the gathered memory until its backward, and every rank
would hold the full model. The hooks here save the parameter itself, which ZeRO-3 gathers again for
backward, and recreate the view from it. (DeepSpeed solves this with its own linear layer,
`zero/linear.py`, which it only uses if `zero.Init` builds the model.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


def save_parameters_not_views(model: nn.Module) -> None:
    """Make the forward of `model` save parameters for backward instead of views of them. The
    results are the same to the bit."""
    forward: Callable[..., Any] = model.forward

    @wraps(forward)
    def forward_with_hooks(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(_pack, _unpack):
            return forward(*args, **kwargs)

    model.forward = forward_with_hooks


@dataclass(frozen=True)
class _ParameterView:
    """The description of a view of a parameter; it keeps no memory alive."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # from the parameter's first element


def _pack(tensor: torch.Tensor) -> torch.Tensor | _ParameterView:
    parameter = tensor._base
    if not isinstance(parameter, nn.Parameter):
        return tensor
    offset = int(tensor.storage_offset() - parameter.storage_offset())
    return _ParameterView(parameter, tensor.size(), tensor.stride(), offset)


def _unpack(packed: torch.Tensor | _ParameterView) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    gathered = packed.parameter.detach()
    return gathered.as_strided(
        packed.size, packed.stride, gathered.storage_offset() + packed.offset
    )
