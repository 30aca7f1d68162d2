"""Train every parameter that text reaches."""

from __future__ import annotations

import torch
from torch import nn

from launcher.config.schema.method import FullConfig
from launcher.method.base import CPU, NoAdapterMethod
from launcher.model.load import Weights
from launcher.model.text_path import beyond_text


class Full(NoAdapterMethod):
    """Trains every parameter of the model. Those of a composite that text does not reach have no
    gradient, and weight decay alone would shrink them: they stay the base's."""

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def prepare(
        self,
        model: nn.Module,
        seed: int,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> nn.Module:
        model.requires_grad_(True)
        unreached = beyond_text(model)
        for module in unreached.values():
            module.requires_grad_(False)
        self.is_partial = bool(unreached)
        return model
