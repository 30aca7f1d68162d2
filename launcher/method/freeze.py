"""Train some layers, and modules outside them by name; freeze the rest."""

from __future__ import annotations

import re

import torch
from torch import nn

from launcher.config.method import FreezeConfig
from launcher.errors import UserError
from launcher.method.base import CPU, Sharded
from launcher.model.layers import decoder_layers
from launcher.model.load import Weights


class Freeze(Sharded):
    """Checkpoints hold the trained weights alone: the others are the base's to the bit."""

    partial = True

    def __init__(self, config: FreezeConfig) -> None:
        self.config = config

    def prepare(
        self,
        model: nn.Module,
        seed: int,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> nn.Module:
        """Raises UserError for a name that no module has, and for more layers than there are."""
        model.requires_grad_(False)
        for layer in self._layers(model):
            for module in self._inside(layer):
                module.requires_grad_(True)
        for module in self._outside(model):
            module.requires_grad_(True)
        return model

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        count = self.config.layers
        if count == 0:
            return []
        found = decoder_layers(model)
        if abs(count) > len(found):
            raise UserError(f"method.layers={count}, and the model has {len(found)} layers")
        return found[-count:] if count > 0 else found[:-count]

    def _inside(self, layer: nn.Module) -> list[nn.Module]:
        names = self.config.modules
        if names == ["all"]:
            return [layer]
        return _named(layer, names, "method.modules", "inside a layer")

    def _outside(self, model: nn.Module) -> list[nn.Module]:
        inside = {id(m) for layer in decoder_layers(model) for m in layer.modules()}
        named = [
            (name, module) for name, module in model.named_modules() if id(module) not in inside
        ]
        return _find(named, self.config.extra_modules, "method.extra_modules", "outside the layers")


def _named(root: nn.Module, names: list[str], key: str, where: str) -> list[nn.Module]:
    return _find(list(root.named_modules()), names, key, where)


def _find(
    modules: list[tuple[str, nn.Module]], names: list[str], key: str, where: str
) -> list[nn.Module]:
    """The modules that end in one of `names`; each name must have one, with parameters."""
    found: list[nn.Module] = []
    for wanted in names:
        hits = [m for name, m in modules if re.fullmatch(rf"(.*\.)?{re.escape(wanted)}", name)]
        hits = [module for module in hits if next(module.parameters(), None) is not None]
        if not hits:
            leaves = sorted({n.rpartition(".")[2] for n, m in modules if n and _holds(m)})
            raise UserError(
                f"{key}: {wanted} is the name of no module {where}; there are {', '.join(leaves)}"
            )
        found += hits
    return found


def _holds(module: nn.Module) -> bool:
    """Whether a module has parameters and is no list of modules."""
    return not isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None
