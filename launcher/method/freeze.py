"""Train some layers, and modules outside them by name; freeze the rest."""

from __future__ import annotations

import torch
from torch import nn

from launcher.config.schema.method import FreezeConfig
from launcher.errors import UserError
from launcher.io.module_paths import ends_in
from launcher.method.base import CPU, NoAdapterMethod
from launcher.model.layers import decoder_layers
from launcher.model.load import Weights
from launcher.model.text_part import non_text_paths, refuse_non_text


class Freeze(NoAdapterMethod):
    """Trains the first or last layers, and other modules by name. Checkpoints contain only the
    trained weights; the others are equal to the base's to the bit."""

    is_partial = True

    def __init__(self, config: FreezeConfig) -> None:
        self.config = config

    def prepare(
        self,
        model: nn.Module,
        seed: int,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> nn.Module:
        """Raises UserError for a name that matches no module, or only modules that text does not
        reach, and if the model has fewer layers than are to be trained."""
        model.requires_grad_(False)
        for layer in self._select_layers(model):
            for module in self._select_within(layer):
                module.requires_grad_(True)
        for module in self._select_outside_layers(model):
            module.requires_grad_(True)
        for path in non_text_paths(model):  # also inside a module that is named
            model.get_submodule(path).requires_grad_(False)
        return model

    def _select_layers(self, model: nn.Module) -> list[nn.Module]:
        count = self.config.layers
        if count == 0:
            return []
        layers = decoder_layers(model)
        if abs(count) > len(layers):
            raise UserError(f"method.layers={count}, but the model has {len(layers)} layers")
        return layers[-count:] if count > 0 else layers[:-count]

    def _select_within(self, layer: nn.Module) -> list[nn.Module]:
        names = self.config.modules
        if names == ["all"]:
            return [layer]
        return _find_modules(dict(layer.named_modules()), names, "method.modules", "inside a layer")

    def _select_outside_layers(self, model: nn.Module) -> list[nn.Module]:
        inside = {id(m) for layer in decoder_layers(model) for m in layer.modules()}
        outside = {name: m for name, m in model.named_modules() if id(m) not in inside}
        names, key = self.config.extra_modules, "method.extra_modules"
        non_text = non_text_paths(model)
        for wanted in names:
            found = [name for name in outside if ends_in(name, wanted)]
            refuse_non_text(key, wanted, found, non_text)
        return _find_modules(outside, names, key, "outside the layers")


def _find_modules(
    modules: dict[str, nn.Module], names: list[str], key: str, scope: str
) -> list[nn.Module]:
    """The modules whose path ends in one of `names`. Raises UserError for a name that matches no
    module with parameters; `key` and `scope` are for its message."""
    found: list[nn.Module] = []
    for wanted in names:
        matches = [
            module
            for name, module in modules.items()
            if ends_in(name, wanted) and _has_parameters(module)
        ]
        if not matches:
            available = sorted(
                {
                    name.rpartition(".")[2]
                    for name, module in modules.items()
                    if name and _has_parameters(module) and not isinstance(module, nn.ModuleList)
                }
            )
            raise UserError(
                f"{key}: no module {scope} is named {wanted}; choose from {', '.join(available)}"
            )
        found += matches
    return found


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
