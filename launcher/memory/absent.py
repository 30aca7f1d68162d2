"""A model folder of which only config.json is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.config.model import ModelConfig
from launcher.config.model_rules import is_hub_id
from launcher.errors import UserError


class Absent:
    """A stored tensor that cannot be read: its shape and dtype, and no values."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype)


class AbsentTensors:
    """The tensors that `model` would be filled from, stored in `dtype`."""

    bytes_read = 0

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._dtype = dtype

    @property
    def nbytes(self) -> int:
        return sum(shape.numel() for shape in self._shapes.values()) * self._dtype.itemsize

    def __getitem__(self, name: str) -> Absent:
        return Absent(self._shapes[name], self._dtype)


def config_folder(source: ModelConfig) -> Path:
    """A folder with the model's config.json; of a model on the hub nothing else is fetched, but its
    code where that is trusted. Raises UserError where there is none."""
    if not is_hub_id(source.name_or_path):
        folder = Path(source.name_or_path)
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name_or_path={folder}: there is no config.json")
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["config.json", *["*.py"] * source.trust_remote_code]
    try:
        return Path(
            snapshot_download(
                source.name_or_path, revision=source.revision, allow_patterns=patterns
            )
        )
    except Exception as error:  # the hub's client raises a dozen kinds; each means: not here
        raise UserError(
            f"model.name_or_path={source.name_or_path}: its config.json could not be fetched from "
            f"the hub: {error}. Give a local folder with it instead"
        ) from error


@torch.no_grad()
def as_fakes(model: nn.Module) -> None:
    """Inside fakes: the parameters of `model`, on meta, as fake ones on meta. Tied ones stay so."""
    made: dict[int, nn.Parameter] = {}
    kept: list[Any] = []  # an id is unique while its owner lives
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                kept.append(parameter)
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter))
            setattr(module, name, made[id(parameter)])
