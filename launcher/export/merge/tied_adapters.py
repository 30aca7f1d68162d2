"""Adapters of layers that share a weight: the base has it under one of their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from launcher.errors import UserError
from launcher.export.merge.edits import same_values
from launcher.io.adapter import PREFIX, Adapter
from launcher.io.adapter_config import rank_and_scale
from launcher.io.adapter_places import LORA
from launcher.io.tensor import Tensor

WEIGHT = ".weight"


def with_stored_names(
    adapter: Adapter, stored: Collection[str], tied: Mapping[str, str]
) -> Adapter:
    """`adapter` with the LoRA of layers that share a weight once, by the name that the base has.

    `stored`: the base's names in memory. `tied`: another name of a parameter → the stored one; not
    those of embedding and head. Raises UserError if these layers have different adapters.
    """
    moved = {
        alias.removesuffix(WEIGHT): name.removesuffix(WEIGHT)
        for alias, name in tied.items()
        if alias.endswith(WEIGHT) and alias not in stored and name in stored
    }
    adapted = {match[1] for name in adapter.tensors if (match := _module(name))}
    for alias, module in moved.items():
        if (alias in adapted) != (module in adapted) or (
            alias in adapted
            and rank_and_scale(adapter.config, alias) != rank_and_scale(adapter.config, module)
        ):
            raise _different(adapter, alias, module)
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        match = _module(name)
        if match is None or match[1] not in moved:
            tensors[name] = tensor
            continue
        alias, module = match[1], moved[match[1]]
        twin = adapter.tensors.get(PREFIX + module + name.removeprefix(PREFIX + alias))
        if twin is None or not same_values(twin, tensor):
            raise _different(adapter, alias, module)
    return replace(adapter, tensors=tensors)


def _module(name: str) -> re.Match[str] | None:
    return LORA.fullmatch(name.removeprefix(PREFIX))


def _different(adapter: Adapter, one: str, other: str) -> UserError:
    return UserError(
        f"{adapter.origin}: {one} and {other} share a weight, and their adapters differ, so there "
        "is no merged weight → keep it as an adapter, which PEFT computes beside the base"
    )
