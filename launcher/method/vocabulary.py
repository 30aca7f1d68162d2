"""Trains the embedding and the output head of a vocabulary with new tokens, under every method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from launcher.config.schema.method import FreezeConfig, LoraConfig, MethodConfig


def train_vocabulary(config: MethodConfig, model: Any) -> MethodConfig:
    """`config` with the embedding and the output head of `model` among the trained modules. Tied
    ones are one module."""
    names = _module_names(model)
    if isinstance(config, LoraConfig):
        return replace(config, modules_to_save=_with(config.modules_to_save, names))
    if isinstance(config, FreezeConfig):
        return replace(config, extra_modules=_with(config.extra_modules, names))
    return config


def describe_vocabulary(model: Any, master: torch.dtype) -> str:
    """A log line about the trained embedding and head, and their memory."""
    count = sum(module.weight.numel() for module in _modules(model))
    return (
        f"the embedding and the output head are trained: {count:,} parameters, "
        f"{count * master.itemsize / 1e6:,.1f} MB as {str(master).removeprefix('torch.')}, and as "
        "much again for gradients and for each moment of the optimizer"
    )


def _modules(model: Any) -> list[Any]:
    """The embedding, and the head unless it is tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return [embedding]
    return [embedding, head]


def _module_names(model: Any) -> list[str]:
    """The shortest ends of the modules' paths that name them alone, such as embed_tokens."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [_shortest_name(paths[id(module)], [*paths.values()]) for module in _modules(model)]


def _shortest_name(path: str, paths: list[str]) -> str:
    parts = path.split(".")
    ends = (".".join(parts[first:]) for first in reversed(range(len(parts))))
    return next(end for end in ends if sum(other.endswith(end) for other in paths) == 1)


def _with(named: list[str], added: list[str]) -> list[str]:
    missing = [n for n in added if not any(n == m or n.endswith(f".{m}") for m in named)]
    return [*named, *missing]
