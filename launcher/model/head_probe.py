"""Whether an output head can sum the loss itself: what its model does with what the head returns.

It is tried on the model: a forward without the layers, in which the head returns a stand-in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.io.head_output import output_behind
from launcher.model.logit_transform import LogitTransform, find_transform
from launcher.model.peft import PeftModel


def reason_for_whole_logits(model: nn.Module, head: nn.Module) -> str | None:
    """Why the head cannot sum the loss, or None.

    Runs a forward without the layers: the output of the head must be the output of the model,
    unchanged.
    """
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}"
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(bare).__name__
    if bare.base_model is bare:
        return f"{name} does not declare which of its modules computes the hidden states"
    output = torch.zeros(())
    try:
        logits, input_shapes = output_behind(model, bare, head, output)
    except Exception as error:  # slicing or splitting a 0-d output raises various errors
        return f"{name} computes with the logits ({type(error).__name__}: {error})"
    if input_shapes != [(1, 2, head.in_features)]:
        return f"{name} calls its head {len(input_shapes)} times, with {input_shapes}"
    if logits is not output or output._version:
        return f"{name} changes what its head returns"
    return None


def transform_behind(model: nn.Module, head: nn.Module) -> LogitTransform | None:
    """What the model does with the output of its head, if a chunk can do it too and the model can
    do it to a summed loss, None otherwise."""
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(head) is not nn.Linear or bare.base_model is bare:
        return None
    output = torch.zeros(())
    try:
        summed, input_shapes = output_behind(model, bare, head, output)
        if output._version or summed.ndim or input_shapes != [(1, 2, head.in_features)]:
            return None
        return find_transform(
            lambda logits: output_behind(model, bare, head, logits)[0], head.out_features
        )
    except Exception:  # as in reason_for_whole_logits, which reports it
        return None
