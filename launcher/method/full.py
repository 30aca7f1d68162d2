"""Train every parameter that a loss on text trains."""

from __future__ import annotations

import torch
from torch import nn

from launcher.config.schema.method import FullConfig
from launcher.method.base import CPU, NoAdapterMethod
from launcher.model.load import Weights
from launcher.model.text_part import non_text_paths, without_gradient


class Full(NoAdapterMethod):
    """Trains every parameter of the model, except the towers of a composite and what computes
    without gradients, which weight decay would change under ZeRO. Checkpoints then contain the
    trained parameters only."""

    def __init__(self, config: FullConfig) -> None:
        self.config = config
        self.is_partial = False

    def prepare(
        self,
        model: nn.Module,
        seed: int,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> nn.Module:
        model.requires_grad_(True)
        for path in (*non_text_paths(model), *without_gradient(model)):
            model.get_submodule(path).requires_grad_(False)
            self.is_partial = True
        return model
