"""A model folder of which only config.json is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
