"""Train every parameter."""

from __future__ import annotations

from torch import nn

from launcher.config.method import FullConfig
from launcher.method.base import Sharded
from launcher.model.load import Weights


class Full(Sharded):
    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def prepare(self, model: nn.Module, seed: int, weights: Weights | None = None) -> nn.Module:
        return model.requires_grad_(True)
