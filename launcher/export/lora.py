"""LoRA: W + scale · B A, in fp32 with one rounding, a tile of rows at a time.

Bit-equal to PEFT's `merge_and_unload` with its defaults: the scale is applied after the product,
the sum is taken in fp32 and rounded once. Tiles of 64 rows and more give the same bits as the whole
product; thinner ones do not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.safetensors_file import StoredTensor, read_header
from launcher.export.source import read_json

TILE_ROWS = 256
THINNEST_TILE = 64
PREFIX = "base_model.model."
PLAIN: dict[
    str, tuple[Any, ...]
] = {  # setting of adapter_config.json → the values under which the formula above holds
    "peft_type": ("LORA",),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, "gaussian", "eva", None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
}


@dataclass(frozen=True)
class LoraDelta:
    """What is added to one weight [out, in]."""

    a: StoredTensor  # [rank, in]
    b: StoredTensor  # [out, rank]
    scale: float

    def merged(self, weight: StoredTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The merged weight in `dtype`, in tiles of rows from top to bottom."""
        a = self.a.rows(0, self.a.shape[0]).float()
        b = self.b.rows(0, self.b.shape[0]).float()
        for first, last in tiles(weight.shape[0]):
            delta = (b[first:last] @ a) * self.scale
            yield (weight.rows(first, last).float() + delta).to(dtype)


def tiles(rows: int) -> list[tuple[int, int]]:
    """Row ranges of TILE_ROWS; a last one thinner than THINNEST_TILE joins its neighbour."""
    starts = list(range(0, rows, TILE_ROWS))
    if len(starts) > 1 and rows - starts[-1] < THINNEST_TILE:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows], strict=True))


def read_adapter(folder: Path, base: dict[str, StoredTensor]) -> dict[str, LoraDelta]:
    """Name of a base weight → its delta.

    Raises UserError for adapters that are not plain LoRA on linear weights, for tensors that find
    no base weight, and for shapes that do not fit: every adapter tensor is used exactly once.
    """
    config = read_json(folder / "adapter_config.json")
    if lost := {"peft_type", "r", "lora_alpha"} - config.keys():
        raise UserError(f"{folder}/adapter_config.json does not say {', '.join(sorted(lost))}")
    for key, plain in PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(
                f"{folder}/adapter_config.json has {key}={config[key]!r}, which cannot be merged "
                f"yet; plain LoRA can (one of {', '.join(map(repr, plain))})"
            )
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{file} is missing; pickled adapters (.bin) are not read")
    stored = read_header(file)
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise UserError(f"{file}: {name} is not a LoRA weight of a linear layer")
        modules.setdefault(match[1], {})[match[2]] = tensor
    return {
        f"{module}.weight": _delta(file, module, pair, config, base)
        for module, pair in modules.items()
    }


def _delta(
    file: Path,
    module: str,
    pair: dict[str, StoredTensor],
    config: dict[str, Any],
    base: dict[str, StoredTensor],
) -> LoraDelta:
    if pair.keys() != {"A", "B"}:
        raise UserError(
            f"{file}: {module} has only lora_{''.join(pair)}; the other half is missing"
        )
    a, b = pair["A"], pair["B"]
    weight = base.get(f"{module}.weight")
    if weight is None:
        raise UserError(f"{file}: {module} is in no file of the base model; is it another model's?")
    rank = _of_module(config, "rank_pattern", module, config["r"])
    if (b.shape[0], a.shape[1]) != weight.shape or {a.shape[0], b.shape[1]} != {rank}:
        raise UserError(
            f"{file}: {module} has A {a.shape} and B {b.shape}, which do not fit rank {rank} "
            f"and the base weight {weight.shape}"
        )
    alpha = _of_module(config, "alpha_pattern", module, config["lora_alpha"])
    return LoraDelta(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_module(config: dict[str, Any], pattern: str, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
