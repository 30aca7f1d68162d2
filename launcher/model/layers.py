"""The decoder layers of a model: the units of sharding, activation checkpointing and compiling."""

from __future__ import annotations

from torch import nn

from launcher.errors import UserError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers in order: the modules whose classes transformers lists in
    `_no_split_modules`.

    Raises UserError if the model has no such modules.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(model).__name__} does not declare which of its modules are layers "
            "(_no_split_modules), so it cannot be sharded; method=lora strategy=ddp needs no layers"
        )
    return layers
