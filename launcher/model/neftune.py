"""NEFTune: noise on the embeddings during training, https://arxiv.org/abs/2310.05914."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn


def add_noise(model: nn.Module, alpha: float | None) -> None:
    """Add uniform noise to the output [rows, length, width] of the input embedding during training.

    The noise is within ±alpha / √(length × width). As for dropout, it comes from the rank's own
    random state. None: no noise.
    """
    if alpha is not None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(partial(_noise_hook, alpha))


def _noise_hook(
    alpha: float, embedding: nn.Module, inputs: Any, output: torch.Tensor
) -> torch.Tensor:
    if not embedding.training:
        return output
    length, width = output.shape[-2:]
    bound = alpha / math.sqrt(length * width)
    return output + torch.empty_like(output).uniform_(-bound, bound)
