"""The weights of a model folder that contains only config.json."""

from __future__ import annotations

import torch
from torch import nn


class FakeWeight:
    """A stored tensor with a shape and a dtype, but without values."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def read(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialized box of `shape`."""
        return torch.empty(shape, dtype=self.dtype)


class FakeWeights:
    """The tensors from which `model` would be loaded, stored in `dtype`."""

    bytes_read = 0

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._dtype = dtype

    @property
    def nbytes(self) -> int:
        return sum(shape.numel() for shape in self._shapes.values()) * self._dtype.itemsize

    def __getitem__(self, name: str) -> FakeWeight:
        return FakeWeight(self._shapes[name], self._dtype)


@torch.no_grad()
def make_parameters_fake(model: nn.Module) -> None:
    """Replace the parameters of `model`, which are on meta, by fake tensors on meta. Tied
    parameters stay tied. Call this inside `FakeTensors`."""
    fake_parameters: dict[int, nn.Parameter] = {}
    originals: list[nn.Parameter] = []  # an id is only unique while its object is alive
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in fake_parameters:
                originals.append(parameter)
                fake_parameters[id(parameter)] = nn.Parameter(torch.empty_like(parameter))
            setattr(module, name, fake_parameters[id(parameter)])
