"""Adapters trained when every expert was a module of its own, on a base whose experts are fused.

transformers 4 had `experts.3.gate_proj`; transformers 5 has `experts.gate_up_proj` [experts, out,
in], the gate above the up projection. PEFT fuses such adapters when it loads them
(utils/transformers_weight_conversion.py); the deltas here are the ones that it arrives at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from launcher.errors import UserError
from launcher.export.merge.adapter import Adapter
from launcher.export.merge.edits import Edit, Experts
from launcher.export.merge.experts import fused
from launcher.export.merge.factors import Factors
from launcher.export.merge.lora import Delta
from launcher.export.merge.parameters import TURNED_MODELS

EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(w[123]|gate_proj|up_proj|down_proj)")
FUSED = {
    "gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")),
    "down_proj": (("w2", "down_proj"),),
}

Shapes = dict[str, tuple[int, ...]]
Found = dict[str, dict[tuple[int, str], str]]  # container → (expert, projection) → module


def edits(
    adapter: Adapter, modules: dict[str, Factors], shapes: Shapes, config: dict[str, Any]
) -> Iterator[tuple[str, Edit]]:
    """Removes what it uses from `modules`."""
    _rename_routers(modules, shapes)
    found: Found = {}
    for module in modules:
        match = EXPERT.fullmatch(module)
        if not match or f"{module}.weight" in shapes or config.get("model_type") in TURNED_MODELS:
            continue
        container = _today(match[1])
        if f"{container}.experts.down_proj" in shapes:
            found.setdefault(container, {})[int(match[2]), match[3]] = module
    for container, experts in found.items():
        for name, projections in FUSED.items():
            weight = f"{container}.experts.{name}"
            if len(shapes.get(weight, ())) != 3:
                continue
            if any(part in pair for _, part in experts for pair in projections):
                deltas = tuple(
                    _expert(adapter, modules, experts, each, projections, shapes[weight])
                    for each in range(shapes[weight][0])
                )
                yield weight, Experts(deltas, turned=False)


def _expert(
    adapter: Adapter,
    modules: dict[str, Factors],
    experts: dict[tuple[int, str], str],
    expert: int,
    projections: tuple[tuple[str, str], ...],
    shape: tuple[int, ...],
) -> Delta:
    """The delta of one expert; removes its factors from `modules`."""
    pairs, scales = [], set()
    for names in projections:
        module = next((experts[expert, each] for each in names if (expert, each) in experts), None)
        if module is None:
            one = next(iter(experts.values()))
            raise UserError(
                f"{adapter.origin}: expert {expert} has no {' or '.join(names)} beside {one}; a "
                "fused weight is merged for all its experts and projections, or not at all"
            )
        of = modules.pop(module)
        outputs = shape[1] // len(projections)
        of.refuse_more(adapter, module)
        scales.add(of.checked(adapter, module, shape[2], outputs, shape)[1])
        pairs.append((of.a, of.b))
    if len(scales) > 1 or (adapter.config.get("use_rslora") and len(pairs) > 1):
        raise UserError(
            f"{adapter.origin}: {'use_rslora' if len(scales) == 1 else 'scales that differ'} for "
            "projections that the base fuses, which PEFT would scale otherwise than in training; "
            "merge it with the transformers that it was trained with"
        )
    return fused(tuple(pairs), scales.pop())


def _rename_routers(modules: dict[str, Factors], shapes: Shapes) -> None:
    """Mixtral's `block_sparse_moe.gate` is `mlp.gate` today."""
    for module in list(modules):
        today = _today(module)
        known = f"{module}.weight" in shapes or today in modules
        if not known and f"{today}.weight" in shapes:
            modules[today] = modules.pop(module)


def _today(module: str) -> str:
    return re.sub(r"\.block_sparse_moe(?=\.|$)", ".mlp", module)
