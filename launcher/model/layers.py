"""Which blocks of a model are sharded, checkpointed and compiled as units."""

from __future__ import annotations

from torch import nn

from launcher.errors import UserError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, in order: the classes that transformers says must not be split.

    Raises UserError for a model that names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(model).__name__} does not say which of its modules are layers "
            "(_no_split_modules), so it cannot be sharded; method=lora strategy=ddp needs no layers"
        )
    return layers
