"""The decoder layers of a model: the units of sharding, activation checkpointing and compiling."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from launcher.errors import UserError
from launcher.model.text_part import non_text_modules


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers in order: the modules whose classes transformers lists in
    `_no_split_modules`, embeddings and the like excepted.

    Where it lists none, they are the elements of the model's lists of modules. A layer is never
    inside another, nor in a part that text does not reach. Raises UserError if the model has no
    such modules.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    non_text = {module for part in non_text_modules(model) for module in part.modules()}
    modules = [module for module in model.modules() if module not in non_text]
    repeated = {each for kind in modules if isinstance(kind, nn.ModuleList) for each in kind}
    declared = [module for module in modules if type(module).__name__ in names]
    layers = outermost([module for module in declared if module in repeated] or declared)
    layers = layers or outermost(module for module in modules if module in repeated)
    if not layers:
        raise UserError(
            f"{type(model).__name__} does not declare which of its modules are layers "
            "(_no_split_modules), so it cannot be sharded; method=lora strategy=ddp needs no layers"
        )
    return layers


def outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of `modules`, in the order of `nn.Module.modules`, that are inside none of the others
    before them."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in modules:
        if module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found
