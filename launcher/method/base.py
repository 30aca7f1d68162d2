"""What a method is to the rest of the house."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from launcher.model.load import Weights

CPU = torch.device("cpu")


class Method(Protocol):
    """Chooses the parameters to train and writes the trained part."""

    adapter: bool  # True: only the trained parameters are kept, as a PEFT adapter folder
    partial: bool  # True: the shards hold the trained parameters alone, the base has the others
    scheme: dict[str, Any] | None  # how the base was quantised, as a config.json of transformers

    def __init__(self, config: Any) -> None: ...

    def prepare(
        self,
        model: Any,
        seed: int,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> Any:
        """Set `requires_grad` everywhere and add what is to be trained.

        Parameters of the model may be on meta: `weights` says where they are on disk. What the
        method adds must be real and the same on every rank: it is drawn from `seed`. `device`
        trains, and may do heavy work here.
        """

    def describe(self) -> str | None:
        """What `prepare` did to the base, for the start of the log."""

    def rate(self, name: str) -> float:
        """The multiple of the learning rate that the parameter `name` is trained with."""

    def write(self, model: Any, trained: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the gathered trained parameters (name in `model` → whole fp32 tensor)."""

    def read(self, model: Any, folder: Path) -> dict[str, torch.Tensor]:
        """What `write` wrote: name in `model` → whole fp32 tensor."""


class Sharded:
    """A method that adds nothing: the strategy writes and reads the shards of what is trained."""

    adapter = False
    partial = False
    scheme: dict[str, Any] | None = None

    def describe(self) -> str | None:
        return None

    def rate(self, name: str) -> float:
        return 1.0

    def write(self, model: Any, trained: dict[str, torch.Tensor], folder: Path) -> None:
        raise NotImplementedError("the strategy writes the shards of this method")

    def read(self, model: Any, folder: Path) -> dict[str, torch.Tensor]:
        raise NotImplementedError("the strategy reads the shards of this method")
