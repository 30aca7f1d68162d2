"""Linear layers that can get no adapter, and cannot be quantized, by what their model does with
them."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear as linear_product


def unadaptable_linears(model: nn.Module) -> list[str]:
    """The names of linear layers that an adapter would break, or that would pass it by.

    Some classes of transformers compute something else with the weight of a linear layer; others
    give the weight to a fused kernel of the layer around it (Mamba), which never calls the layer.
    """
    found = []
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            full_name = f"{name}.{child_name}".removeprefix(".")
            if isinstance(child, nn.Linear) and (
                _computes_otherwise(child) or _is_passed_by(module, child_name)
            ):
                found.append(full_name)
    return found


def _computes_otherwise(linear: nn.Linear) -> bool:
    """Whether a class of transformers computes something else than a linear layer: some only write
    the same product in another way (Falcon)."""
    kind = type(linear)
    if kind.forward is nn.Linear.forward or not kind.__module__.startswith("transformers."):
        return False
    if kind.__init__ is not nn.Linear.__init__:
        return True
    with torch.random.fork_rng(devices=[]):
        small, values = kind(3, 2), torch.rand(1, 4, 3)
    return not torch.allclose(small(values), linear_product(values, small.weight, small.bias))


def _is_passed_by(module: nn.Module, child_name: str) -> bool:
    """Whether the code of `module` uses the weight of its child without calling the child."""
    if getattr(module, "slow_but_exact", None) is False:  # another way of BLOOM, which is off
        return False
    used = re.compile(rf"self\.{child_name}\.weight\b(?!\.(dtype|device|shape)\b)")
    kind: Any = type(module)
    return any(used.search(source) for source in _sources(kind))


@cache  # a model has few classes and many layers, and reading source takes long
def _sources(kind: type) -> list[str]:
    """The source of each method that `kind` has from transformers."""
    return [
        inspect.getsource(method)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if method.__module__.startswith("transformers.") and "init" not in name
    ]
