"""Existing adapters: to continue training one, or to merge some into the base first."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from launcher.errors import UserError
from launcher.folders import links
from launcher.folders.adapter import WEIGHTS, adapter_folder, adapter_settings
from launcher.io.adapter import PREFIX, read_adapter
from launcher.io.adapter_config import check_mergeable, rank_and_scale
from launcher.io.adapter_places import CHANGED_SETTINGS, inner_settings
from launcher.io.model_class import places_of
from launcher.io.readers.safetensors_file import read_tensors
from launcher.method.initial_delta import BaseWeights, LowRankDelta
from launcher.model.peft import PeftConfig

MERGE_HINT = (
    "merge it with `shardway consolidate MODEL --adapter {adapter} --output DIR` and train on DIR"
)


def read_adapter_tensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by their names on disk."""
    return read_tensors(find_adapter(path, "method.adapter") / WEIGHTS)


def find_adapter(path: str, key: str) -> Path:
    """The folder of the adapter that `path` is or contains; `key` is the setting with the path.

    Raises UserError if there is no adapter, if its delta belongs to a base that was changed, or if
    a file of it leads out of the run or checkpoint that `path` is.
    """
    folder = adapter_folder(path)
    if folder is None:
        raise UserError(f"{key}={path} contains no adapter (adapter_config.json and {WEIGHTS})")
    links.check_part(Path(path))
    if folder != Path(path):  # it was found in a run or a checkpoint
        links.check_tree(folder)
    check_mergeable(read_adapter(folder))
    return folder


def for_model(settings: PeftConfig, model: nn.Module, path: str) -> PeftConfig:
    """`settings` of the adapter at `path`, for `model`. They may be those for the composite that it
    is a part of."""
    if (places := places_of(model)) is None:
        return settings
    changed = inner_settings(settings.to_dict(), read_adapter_tensors(path), places)
    for key in CHANGED_SETTINGS:
        setattr(settings, key, changed[key])
    return settings


def read_deltas(path: str) -> dict[str, LowRankDelta]:
    """The delta of each module of a plain LoRA adapter, with the scale in the left factor.

    Raises UserError for other adapters.
    """
    folder = find_adapter(path, "method.merge_first")
    config, tensors = adapter_settings(path), read_adapter_tensors(path)
    deltas = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        if f"{stem}.lora_B.weight" not in tensors:
            raise UserError(f"method.merge_first={path} has {name} and no lora_B; save it again")
        right, left = tensors.pop(name).float(), tensors.pop(f"{stem}.lora_B.weight").float()
        module = stem.removeprefix(PREFIX)
        _, scale = rank_and_scale(config, module)
        deltas[module] = LowRankDelta(left * scale, right)
    if tensors or config.get("use_dora"):
        reason = next(iter(tensors), "DoRA")
        hint = MERGE_HINT.format(adapter=folder)
        raise UserError(f"method.merge_first={path} is not a plain LoRA adapter ({reason}); {hint}")
    return deltas


def merge_adapters(
    model: nn.Module, base: BaseWeights, paths: list[str]
) -> dict[str, LowRankDelta]:
    """Add the adapters at `paths` to the base, in order. Returns the sum of their deltas by module
    of `model`. Raises UserError for an adapter that does not fit."""
    total: dict[str, LowRankDelta] = {}
    places = places_of(model)
    for path in paths:
        for name, delta in read_deltas(path).items():
            module = places.inner(name) if places else name
            total[module] = total[module].plus(delta) if module in total else delta
    for module, delta in total.items():
        base.add(_get_module(model, module, delta), delta)
    return total


def _get_module(model: nn.Module, name: str, delta: LowRankDelta) -> nn.Module:
    """Raises UserError if the model has no such module, or if its shape does not fit `delta`."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise UserError(f"method.merge_first adapts {name}, but the model has no such module")
    module: nn.Module = modules[name]
    weight = module.get_parameter("weight")
    shape = [len(delta.left), delta.right.shape[1]]
    if sorted(weight.shape) != sorted(shape):
        raise UserError(
            f"method.merge_first: {name} has the shape {list(weight.shape)}, its delta {shape}"
        )
    if isinstance(module, nn.Embedding):
        hint = MERGE_HINT.format(adapter="ADAPTER")
        raise UserError(f"method.merge_first adapts the embedding {name}; {hint}")
    return module
