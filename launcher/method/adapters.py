"""Adapters that were trained before: to go on from, or to merge first."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from launcher.config.adapter import WEIGHTS, adapter_folder, adapter_settings
from launcher.errors import UserError
from launcher.export.merge.adapter import PREFIX, read_adapter
from launcher.export.merge.settings import check, rank_and_scale
from launcher.method.offsets import Base, LowRank

WAY_OUT = "merge it with `shardway consolidate MODEL --adapter {0} --output DIR` and train on DIR"


def tensors_of(path: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by their names on disk."""
    return load_file(folder_of(path, "method.adapter") / WEIGHTS)


def folder_of(path: str, key: str) -> Path:
    """Raises UserError when `path` holds no adapter, or one whose delta belongs to another base."""
    folder = adapter_folder(path)
    if folder is None:
        raise UserError(f"{key}={path} holds no adapter (adapter_config.json and {WEIGHTS})")
    check(read_adapter(folder))
    return folder


def low_ranks(path: str) -> dict[str, LowRank]:
    """The delta of each module of a plain LoRA, its scale in the left factor.

    Raises UserError for an adapter that is more than that.
    """
    folder = folder_of(path, "method.merge_first")
    config, tensors = adapter_settings(path), tensors_of(path)
    found = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        right, left = tensors.pop(name).float(), tensors.pop(f"{stem}.lora_B.weight").float()
        module = stem.removeprefix(PREFIX)
        _, scale = rank_and_scale(config, module)
        found[module] = LowRank(left * scale, right)
    if tensors or config.get("use_dora"):
        what = next(iter(tensors), "a DoRA")
        way_out = WAY_OUT.format(folder)
        raise UserError(f"method.merge_first={path} is no plain LoRA ({what}); {way_out}")
    return found


def merge_first(model: nn.Module, base: Base, paths: list[str]) -> dict[str, LowRank]:
    """Add the adapters to the base, in order; the sum of their deltas by module of `model`."""
    total: dict[str, LowRank] = {}
    for path in paths:
        for module, delta in low_ranks(path).items():
            total[module] = total[module].beside(delta) if module in total else delta
    for module, delta in total.items():
        base.add(_module(model, module, delta), delta)
    return total


def _module(model: nn.Module, name: str, delta: LowRank) -> nn.Module:
    """Raises UserError when the model has no such module, or it has another shape."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise UserError(f"method.merge_first adapts {name}, which the model has not")
    found: nn.Module = modules[name]
    weight = found.get_parameter("weight")
    shape = len(delta.left), delta.right.shape[1]
    if sorted(weight.shape) != sorted(shape):
        raise UserError(f"method.merge_first: {name} is {list(weight.shape)}, its delta {shape}")
    if isinstance(found, nn.Embedding):
        raise UserError(f"method.merge_first adapts the embedding {name}; {WAY_OUT.format('DIR')}")
    return found
