"""Masks of packed documents, made outside of the model.

Most classes of transformers find the documents by `position_ids`; some do not pass them to the
functions that make masks (gpt-oss). They take masks that are ready, as `generate` makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate


def give_masks(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Give `model`, without adapters, a mask with each forward of packed documents. `dtype`: of the
    computation. Returns a function that takes this back."""
    forward = model.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("document_lengths") is not None and kwargs.get("attention_mask") is None:
            positions = kwargs["position_ids"]
            kwargs["attention_mask"] = create_masks_for_generate(
                config=model.config,
                # Read for its sizes, dtype and device.
                inputs_embeds=torch.empty(
                    (*positions.shape, 0), dtype=dtype, device=positions.device
                ),
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
        return forward(*args, **kwargs)

    def take_back() -> None:
        model.forward = forward

    model.forward = run
    return take_back
