"""The experts and routers of a model, found by what they are and not by the model's name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

ROUTER_CLASS = re.compile(r"Router|Gate$|Gating$")
ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True)
class SparseBlock:
    """Experts, and the routers beside them that choose which expert computes for a token."""

    path: str  # of the experts, without the wrappers of adapters
    experts: nn.Module
    stacks: tuple[str, ...]  # its parameters [experts, …, …]; (): each expert is a module
    routers: dict[str, nn.Module] = field(default_factory=dict)  # by path

    def stack_paths(self) -> list[str]:
        """The names of the stacks in the model."""
        return [f"{self.path}.{stack}" for stack in self.stacks]


def sparse_blocks(model: nn.Module) -> list[SparseBlock]:
    """The blocks in order. Adapters may already be there."""
    blocks = []
    for name, module in model.named_modules():
        if "lora_" in name or not _has_experts(name, module):
            continue
        stacks = tuple(key for key, p in module.named_parameters(recurse=False) if p.ndim == 3)
        path = name.replace(".base_layer", "")
        blocks.append(SparseBlock(path, module, stacks, dict(_routers(model, path))))
    return blocks


def unadaptable_experts(model: nn.Module) -> list[str]:
    """The classes of experts whose weights are neither stacks nor linear layers (DBRX): PEFT has no
    adapter for them."""
    kinds = {
        type(block.experts).__name__: None
        for block in sparse_blocks(model)
        if not (block.stacks or isinstance(block.experts, nn.Linear))
        and any(p.ndim == 2 for p in block.experts.parameters(recurse=False))
    }
    return list(kinds)


def is_grouped(experts: nn.Module) -> bool:
    """Whether transformers can compute `experts` by grouped matrix products; other experts compute
    in a way of their own."""
    return all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed"))


def _has_experts(name: str, module: nn.Module) -> bool:
    is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    in_class = "Expert" in type(module).__name__
    return (is_list and name.endswith("experts")) or (in_class and not hasattr(module, "lora_A"))


def _routers(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The routers beside the experts at `path`."""
    parent, _, _ = path.rpartition(".")
    for name, outer in model.get_submodule(parent).named_children():
        child: Any = outer
        while hasattr(child, "base_layer"):
            child = child.base_layer
        beside = f"{parent}.{name}" if parent else name
        kind = type(child).__name__
        if beside != path and (name in ROUTER_NAMES or ROUTER_CLASS.search(kind)):
            yield beside, child
