"""Adapters whose training began with factors of the base (PiSSA, OLoRA …): W = W' + s · B₀ A₀, and
W' was trained on.

The trained weight is W' + s · B A = W + s · (B A - B₀ A₀). This is LoRA of twice the rank on W, as
PEFT's `path_initial_model_for_weight_conversion` writes it (tuners/lora/model.py,
subtract_mutated_init), and has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.bases import INITIAL
from launcher.folders.adapter import SETTINGS
from launcher.io.adapter import Adapter, read_adapter
from launcher.io.adapter_config import has_initial_factors
from launcher.io.tensor import Tensor
from launcher.io.tensor.views import concat


@dataclass(frozen=True, eq=False)
class Negated(Tensor):
    source: Tensor

    def read_into(self, out: torch.Tensor, first: int) -> None:
        self.source.read_into(out, first)
        out.neg_()

    def reference(self, first: int, last: int) -> torch.Tensor:
        return -self.source.reference(first, last)

    def files(self) -> Iterator[Path]:
        return self.source.files()


def without_initial(adapter: Adapter) -> Adapter:
    """`adapter` as plain LoRA of the base, if its initial factors are beside it. Otherwise it is
    returned as it is: only those can say what was trained on.

    Raises UserError if the factors beside it are those of another adapter.
    """
    if not has_initial_factors(adapter.config) or adapter.config.get("use_dora"):
        return adapter
    if (folder := _initial_folder(adapter.origin)) is None:
        return adapter
    initial = read_adapter(folder).tensors
    tensors = dict(adapter.tensors)
    for name, tensor in adapter.tensors.items():
        dim = {".lora_A.weight": 0, ".lora_B.weight": 1}.get(name[-len(".lora_A.weight") :])
        if dim is None:
            continue
        if name not in initial or initial[name].shape != tensor.shape:
            shape = list(initial[name].shape) if name in initial else "no such tensor"
            raise UserError(
                f"{folder}, the initial factors of {adapter.origin}, has {shape} for {name}, which "
                f"is {list(tensor.shape)} after training → the folder of the same training"
            )
        tensors[name] = _joined(tensor, initial[name], dim)
    return replace(adapter, config=_doubled(adapter.config), tensors=tensors)


def _joined(trained: Tensor, initial: Tensor, dim: int) -> Tensor:
    """[A; A₀], or [B, -B₀], in the wider dtype of both."""
    dtype = torch.promote_types(trained.dtype, initial.dtype)
    parts = [trained.to(dtype), initial.to(dtype)]
    if dim == 1:
        parts[1] = Negated(initial.name, dtype, initial.shape, parts[1])
    shape = list(trained.shape)
    shape[dim] *= 2
    return concat(parts, dim, tuple(shape)).renamed(trained.name)


def _doubled(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of twice the rank and of the same scale."""
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return config | {
        "r": config["r"] * 2,
        "lora_alpha": config["lora_alpha"] * factor,
        "rank_pattern": {k: v * 2 for k, v in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {k: v * factor for k, v in (config.get("alpha_pattern") or {}).items()},
        "init_lora_weights": True,
    }


def _initial_folder(origin: Path) -> Path | None:
    """The adapter that was saved before training, in the adapter's folder or beside it: a folder
    such as `pissa_init`. Raises UserError if there are several."""
    inside, beside = (
        sorted({file.parent for each in INITIAL for file in place.glob(f"{each}/{SETTINGS}")})
        for place in (origin, origin.parent)
    )
    folders = inside or [folder for folder in beside if folder != origin]
    if len(folders) > 1:
        raise UserError(
            f"{folders[0]} and {folders[1]} may both be the initial factors of {origin} → keep one "
            "of them there"
        )
    return next(iter(folders), None)
