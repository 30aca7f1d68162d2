"""The interface of a training method."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from launcher.config.schema.method import MethodConfig
from launcher.model.load import Weights

CPU = torch.device("cpu")


class Method(Protocol):
    """Selects the parameters to train, and writes an adapter if it trains one."""

    is_adapter: bool  # True: checkpoints contain a PEFT adapter folder and no other weights
    is_partial: bool  # True: shards contain only the trained parameters; the base has the others
    # How the base was quantized, as in the config.json of transformers; None: not quantized.
    quantization_scheme: dict[str, Any] | None

    def __init__(self, config: MethodConfig) -> None: ...

    def prepare(
        self,
        model: nn.Module,
        seed: int,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> nn.Module:
        """Set `requires_grad` of all parameters, and add the parameters that the method trains.

        Parameters of `model` may be on meta; `weights` then has their places on disk. Added
        parameters have values, the same ones on every rank: they are drawn from `seed`. `device` is
        the training device, which may do heavy computations here.
        """

    def describe(self) -> str | None:
        """What `prepare` did to the base, for the start of the log; None: nothing."""

    def lr_multiplier(self, name: str) -> float:
        """The factor on the learning rate of the parameter `name`."""

    def write(self, model: nn.Module, trained: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the gathered trained parameters (name in `model` → full fp32 tensor)."""

    def read(self, model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
        """Read what `write` wrote: name in `model` → full fp32 tensor."""


class NoAdapterMethod:
    """Base class of methods that add no parameters. Their checkpoints are shards, which the
    strategy's state provides, and not an adapter folder."""

    is_adapter = False
    is_partial = False
    quantization_scheme: dict[str, Any] | None = None

    def describe(self) -> str | None:
        return None

    def lr_multiplier(self, name: str) -> float:
        return 1.0

    def write(self, model: nn.Module, trained: dict[str, torch.Tensor], folder: Path) -> None:
        raise NotImplementedError("this method is saved as shards of the strategy's state")

    def read(self, model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
        raise NotImplementedError("this method is restored from shards of the strategy's state")
