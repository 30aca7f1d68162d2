"""Train every parameter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from launcher.config.method import FullConfig


class Full:
    """Nothing is added; the strategy saves the model's shards."""

    adapter = False

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        return model.requires_grad_(True)

    def write(self, model: nn.Module, trained: dict[str, torch.Tensor], folder: Path) -> None:
        raise NotImplementedError("the shards of a full run are written by the strategy")

    def read(self, model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
        raise NotImplementedError("the shards of a full run are read by the strategy")
