"""One adapter for the layers that share a weight: the blocks that Zamba repeats at several depths.

PEFT gives each place an adapter of its own. Their sum is no change of the one weight, and PEFT
merges all of them into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from launcher.config.schema.method import LoraConfig
from launcher.errors import UserError
from launcher.io.adapter import ADAPTER_NAME
from launcher.method.peft_tensors import lora_layers
from launcher.model.peft import LoraLayer, ModulesToSaveWrapper, PeftModel


def share_adapters(model: PeftModel, config: LoraConfig) -> None:
    """Give the layers of `model` that share a weight the same A and B.

    Raises UserError if only some of them are adapted, or in another way, or trained in full: a
    base has the weight once.
    """
    layers = lora_layers(model)
    shared = _shared_weights(model.get_base_model(), layers)
    for name, layer in layers.items():
        group = shared.get(id(getattr(layer.get_base_layer(), "weight", None)), [name])
        first = group[0]
        if apart := next((each for each in group if each not in layers), None):
            raise UserError(
                f"method.target_modules: {name} is adapted and {apart} is not, but they share a "
                "weight → a name that both end in, or all-linear"
            )
        if name == first:
            continue
        _check_settings(config, first, name, layers)
        for part in layer.adapter_layer_names:
            values = getattr(layers[first], part)
            if ADAPTER_NAME in values:
                getattr(layer, part)[ADAPTER_NAME] = values[ADAPTER_NAME]
    _refuse_full_copies(model)


def _shared_weights(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[int, list[str]]:
    """id of a weight → the modules that have it, if there are several and one is adapted."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "_parameters", {}).get("weight")
        if weight is not None:
            found.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    return {
        key: names
        for key, names in found.items()
        if len(names) > 1 and not layers.keys().isdisjoint(names)
    }


def _check_settings(
    config: LoraConfig, first: str, name: str, layers: Mapping[str, LoraLayer]
) -> None:
    one, other = layers[first], layers[name]
    places = f"{first} and {name} share a weight"
    for key, value in {"pissa": config.pissa, "merge_first": config.merge_first}.items():
        if value:
            raise UserError(
                f"method.{key}={value}: {places}, which would change twice → method without {key}"
            )
    settings: list[Any] = [(x.r[ADAPTER_NAME], x.scaling[ADAPTER_NAME]) for x in (one, other)]
    if settings[0] != settings[1]:
        raise UserError(
            f"method.rank_pattern, method.alpha_pattern: {places}, and have one adapter → the same "
            "rank and alpha for both"
        )


def _refuse_full_copies(model: PeftModel) -> None:
    """modules_to_save gives each module a copy; embedding and head may differ after export."""
    base = model.get_base_model()
    vocabulary = [base.get_input_embeddings(), base.get_output_embeddings()]
    first: dict[int, str] = {}
    for name, module in base.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or module in vocabulary:
            continue
        for parameter in module.original_module.parameters():
            if first.setdefault(id(parameter), name) != name:
                raise UserError(
                    f"method.modules_to_save: {first[id(parameter)]} and {name} share a weight, of "
                    "which each would train a copy → method.target_modules, or method=full"
                )
