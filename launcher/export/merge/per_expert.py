"""Adapters that were trained when every expert was a separate module, on a base with fused experts.

transformers 4 had `experts.3.gate_proj`; transformers 5 has `experts.gate_up_proj` [experts, out,
in], with the gate projection above the up projection. PEFT fuses such adapters when it loads them
(utils/transformers_weight_conversion.py). The deltas here are equal to PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from launcher.errors import UserError
from launcher.export.merge.edits import Edit, ExpertLora
from launcher.export.merge.experts import fuse_projections
from launcher.export.merge.factors import Factors
from launcher.export.merge.lora import Delta
from launcher.export.merge.target_parameters import TRANSPOSED_EXPERTS
from launcher.io.adapter import Adapter

EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(w[123]|gate_proj|up_proj|down_proj)")
FUSED = {
    "gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")),
    "down_proj": (("w2", "down_proj"),),
}

Shapes = dict[str, tuple[int, ...]]
ExpertModules = dict[tuple[int, str], str]  # (expert, projection) → module


def take_edits(
    adapter: Adapter, modules: dict[str, Factors], shapes: Shapes, config: dict[str, Any]
) -> Iterator[tuple[str, Edit]]:
    """(weight, edit) for the experts among `modules`, which are removed from it."""
    _rename_routers(modules, shapes)
    containers: dict[str, ExpertModules] = {}
    for module in modules:
        match = EXPERT.fullmatch(module)
        has_weight = f"{module}.weight" in shapes
        if not match or has_weight or config.get("model_type") in TRANSPOSED_EXPERTS:
            continue
        container = _current_name(match[1])
        if f"{container}.experts.down_proj" in shapes:
            containers.setdefault(container, {})[int(match[2]), match[3]] = module
    for container, experts in containers.items():
        for name, projections in FUSED.items():
            weight = f"{container}.experts.{name}"
            if len(shapes.get(weight, ())) != 3:
                continue
            if any(part in names for _, part in experts for names in projections):
                deltas = tuple(
                    _expert_delta(adapter, modules, experts, expert, projections, shapes[weight])
                    for expert in range(shapes[weight][0])
                )
                yield weight, ExpertLora(deltas, transposed=False)


def _expert_delta(
    adapter: Adapter,
    modules: dict[str, Factors],
    experts: ExpertModules,
    expert: int,
    projections: tuple[tuple[str, str], ...],
    shape: tuple[int, ...],
) -> Delta:
    """The delta of one expert. Removes its factors from `modules`."""
    pairs, scales = [], set()
    for names in projections:
        module = next((experts[expert, name] for name in names if (expert, name) in experts), None)
        if module is None:
            example = next(iter(experts.values()))
            raise UserError(
                f"{adapter.origin}: expert {expert} has no {' or '.join(names)}, although the "
                f"adapter has {example}; a fused weight can be merged only if all its experts and "
                "projections have factors"
            )
        factors = modules.pop(module)
        outputs = shape[1] // len(projections)
        factors.refuse_dora_and_bias(adapter, module)
        _, scale = factors.checked_rank_and_scale(adapter, module, shape[2], outputs, shape)
        scales.add(scale)
        pairs.append((factors.a, factors.b))
    if len(scales) > 1 or (adapter.config.get("use_rslora") and len(pairs) > 1):
        raise UserError(
            f"{adapter.origin}: {'use_rslora' if len(scales) == 1 else 'different scales'} for "
            "projections that the base fuses, which PEFT would scale differently than in training; "
            "merge it with the version of transformers that it was trained with"
        )
    return fuse_projections(tuple(pairs), scales.pop())


def _rename_routers(modules: dict[str, Factors], shapes: Shapes) -> None:
    """Mixtral's `block_sparse_moe.gate` is now called `mlp.gate`."""
    for module in list(modules):
        current = _current_name(module)
        known = f"{module}.weight" in shapes or current in modules
        if not known and f"{current}.weight" in shapes:
            modules[current] = modules.pop(module)


def _current_name(module: str) -> str:
    return re.sub(r"\.block_sparse_moe(?=\.|$)", ".mlp", module)
