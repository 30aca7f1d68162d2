"""Trains the embedding and the output head of a vocabulary with new tokens, under every method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from launcher.config.schema.method import FreezeConfig, LoraConfig, MethodConfig
from launcher.io.module_paths import ends_in


def train_vocabulary(config: MethodConfig, model: Any) -> MethodConfig:
    """`config` with the embedding and the output head of `model` among the trained modules."""
    paths = {id(module): path for path, module in model.named_modules()}
    names = [paths[id(module)] for module in _modules(model)]
    if isinstance(config, LoraConfig):
        return replace(config, modules_to_save=_with(config.modules_to_save, names))
    if isinstance(config, FreezeConfig):
        return replace(config, extra_modules=_with(config.extra_modules, names))
    return config


def describe_vocabulary(model: Any, master: torch.dtype) -> str:
    """A log line about the trained embedding and head, and their memory."""
    weights = {id(module.weight): module.weight for module in _modules(model)}
    count = sum(weight.numel() for weight in weights.values())
    return (
        f"the embedding and the output head are trained: {count:,} parameters, "
        f"{count * master.itemsize / 1e6:,.1f} MB as {str(master).removeprefix('torch.')}, and as "
        "much again for gradients and for each moment of the optimizer"
    )


def _modules(model: Any) -> list[Any]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head is None else [embedding, head]


def _with(named: list[str], added: list[str]) -> list[str]:
    missing = [n for n in added if not any(ends_in(n, m) for m in named)]
    return [*named, *missing]
