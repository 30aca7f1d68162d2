"""Train every parameter."""

from __future__ import annotations

import torch
from torch import nn

from launcher.config.schema.method import FullConfig
from launcher.method.base import CPU, NoAdapterMethod
from launcher.model.load import Weights


class Full(NoAdapterMethod):
    """Trains every parameter of the model."""

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def prepare(
        self,
        model: nn.Module,
        seed: int,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> nn.Module:
        return model.requires_grad_(True)
