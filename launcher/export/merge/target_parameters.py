"""LoRA on parameters that `target_parameters` names: fused experts [experts, …] and plain matrices.

PEFT wraps a module once for each of its targeted parameters. The parameter that was registered
first is the innermost, so the number of `.base_layer`s is all that distinguishes them in a file
(tuners/lora/layer.py, ParamWrapper).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from launcher.errors import UserError
from launcher.export.merge.edits import Edit, ExpertLora, MatrixLora
from launcher.export.merge.experts import deltas_per_expert
from launcher.export.merge.factors import Factors
from launcher.export.merge.lora import Delta
from launcher.io.adapter import Adapter
from launcher.io.module_paths import ends_in
from launcher.io.tensor import Tensor

# Model types whose experts are [experts, in, out].
TRANSPOSED_EXPERTS = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
# The order in which transformers registers the parameters of fused experts. A test compares it with
# every class.
REGISTRATION_ORDER = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "up_proj_bias", "down_proj",
    "down_proj_bias",
)  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def take_edits(
    adapter: Adapter, modules: dict[str, Factors], shapes: Shapes, config: dict[str, Any]
) -> Iterator[tuple[str, Edit]]:
    """(weight, edit) for the targeted parameters among `modules`, which are removed from it."""
    targets = tuple(adapter.config.get("target_parameters") or ())
    wrappers_of: dict[str, list[str]] = {}
    for module in modules:
        wrappers_of.setdefault(_strip_base_layers(module), []).append(module)
    for module, wrappers in wrappers_of.items():
        names = [
            name
            for name in shapes
            if name.rpartition(".")[0] == module and any(ends_in(name, t) for t in targets)
        ]
        if not names:
            continue
        wrappers.sort(key=len, reverse=True)  # the innermost first
        nested = [modules.pop(wrapper) for wrapper in wrappers]
        transposed_model = config.get("model_type") in TRANSPOSED_EXPERTS
        for name, factors in _assign(adapter, module, names, nested, shapes):
            yield name, _edit(adapter, name, factors, shapes[name], transposed_model)


def is_transposed(shape: tuple[int, ...], a: Tensor, b: Tensor, transposed_model: bool) -> bool:
    """Whether experts are [experts, in, out]. For square experts the model's type decides."""
    if shape[1] == shape[2]:
        return transposed_model
    return (b.shape[0], a.shape[1]) == (shape[2], shape[1])


def _edit(
    adapter: Adapter, name: str, factors: Factors, shape: tuple[int, ...], transposed_model: bool
) -> Edit:
    factors.refuse_dora_and_bias(adapter, name)
    if len(shape) == 2:
        _, scale = factors.checked_rank_and_scale(adapter, name, shape[1], shape[0], shape)
        return MatrixLora(Delta(factors.a, factors.b, scale), transposed=False, delta_first=True)
    transposed = is_transposed(shape, factors.a, factors.b, transposed_model)
    outputs, inputs = shape[:0:-1] if transposed else shape[1:]
    _, scale = factors.checked_rank_and_scale(
        adapter, name, inputs, outputs, shape, experts=shape[0]
    )
    return ExpertLora(deltas_per_expert(factors.a, factors.b, scale, shape[0]), transposed)


def _assign(
    adapter: Adapter, module: str, names: list[str], nested: list[Factors], shapes: Shapes
) -> list[tuple[str, Factors]]:
    """Which factors belong to which parameter: by registration order if it is known, otherwise by
    shape if only one order fits."""
    if len(names) != len(nested):
        raise UserError(
            f"{adapter.origin}: target_parameters names {len(names)} parameter(s) of {module}, but "
            f"the file has {len(nested)}; use the config that was saved with these weights"
        )
    leaves = [name.rpartition(".")[2] for name in names]
    if all(leaf in REGISTRATION_ORDER for leaf in leaves):
        names = sorted(names, key=lambda name: REGISTRATION_ORDER.index(name.rpartition(".")[2]))
        return list(zip(names, nested, strict=True))
    fitting = [
        order
        for order in itertools.permutations(names)
        if all(_may_fit(shapes[name], factors) for name, factors in zip(order, nested, strict=True))
    ]
    if len(fitting) == 1:
        return list(zip(fitting[0], nested, strict=True))
    raise UserError(
        f"{adapter.origin}: the shapes do not determine which of {', '.join(leaves)} of {module} "
        "each LoRA weight belongs to; merge it with PEFT and consolidate the result"
    )


def _may_fit(shape: tuple[int, ...], factors: Factors) -> bool:
    delta_shape = (factors.b.shape[0], factors.a.shape[1])
    return delta_shape == shape[-2:] or (len(shape) == 3 and delta_shape == shape[:0:-1])


def _strip_base_layers(module: str) -> str:
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module
