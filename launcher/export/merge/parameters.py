"""LoRA on parameters that `target_parameters` names: fused experts [experts, …] and plain matrices.

PEFT wraps a module once for each of its targeted parameters, the first registered innermost, so
that a file tells them apart by their `.base_layer`s only (tuners/lora/layer.py, ParamWrapper).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from launcher.errors import UserError
from launcher.export.merge.adapter import Adapter
from launcher.export.merge.edits import Edit, Experts, Low
from launcher.export.merge.experts import delta_of_each
from launcher.export.merge.factors import Factors
from launcher.export.merge.lora import Delta
from launcher.export.tensor import Tensor

TURNED_MODELS = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")  # experts [E, in, out]
ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")  # of registration

Shapes = dict[str, tuple[int, ...]]


def edits(
    adapter: Adapter, modules: dict[str, Factors], shapes: Shapes, config: dict[str, Any]
) -> Iterator[tuple[str, Edit]]:
    """Removes what it uses from `modules`."""
    targets = tuple(adapter.config.get("target_parameters") or ())
    levels: dict[str, list[str]] = {}
    for module in modules:
        levels.setdefault(_bare(module), []).append(module)
    for module, wrappers in levels.items():
        names = [
            name
            for name in shapes
            if name.rpartition(".")[0] == module and _targeted(name, targets)
        ]
        if not names:
            continue
        wrappers.sort(key=len, reverse=True)  # the innermost first
        nested = [modules.pop(each) for each in wrappers]
        turned_model = config.get("model_type") in TURNED_MODELS
        for name, of in _assign(adapter, module, names, nested, shapes):
            yield name, _edit(adapter, name, of, shapes[name], turned_model)


def is_turned(shape: tuple[int, ...], a: Tensor, b: Tensor, turned_model: bool) -> bool:
    """Whether experts are [experts, in, out]; square ones are told by the model's type."""
    if shape[1] == shape[2]:
        return turned_model
    return (b.shape[0], a.shape[1]) == (shape[2], shape[1])


def _edit(
    adapter: Adapter, name: str, of: Factors, shape: tuple[int, ...], turned_model: bool
) -> Edit:
    of.refuse_more(adapter, name)
    if len(shape) == 2:
        _, scale = of.checked(adapter, name, shape[1], shape[0], shape)
        return Low(Delta(of.a, of.b, scale), turned=False, delta_first=True)
    turned = is_turned(shape, of.a, of.b, turned_model)
    outputs, inputs = shape[:0:-1] if turned else shape[1:]
    _, scale = of.checked(adapter, name, inputs, outputs, shape, experts=shape[0])
    return Experts(delta_of_each(of.a, of.b, scale, shape[0]), turned)


def _assign(
    adapter: Adapter, module: str, names: list[str], nested: list[Factors], shapes: Shapes
) -> list[tuple[str, Factors]]:
    """Which wrapper is which parameter's: by registration order where it is known, and by shape
    wherever only one order fits."""
    if len(names) != len(nested):
        raise UserError(
            f"{adapter.origin}: target_parameters names {len(names)} parameter(s) of {module}, but "
            f"the file has {len(nested)}; take the config that was saved with these weights"
        )
    leaves = [name.rpartition(".")[2] for name in names]
    if all(leaf in ORDER for leaf in leaves):
        names = sorted(names, key=lambda name: ORDER.index(name.rpartition(".")[2]))
        return list(zip(names, nested, strict=True))
    fitting = [
        order
        for order in itertools.permutations(names)
        if all(_may_be(shapes[name], of) for name, of in zip(order, nested, strict=True))
    ]
    if len(fitting) == 1:
        return list(zip(fitting[0], nested, strict=True))
    raise UserError(
        f"{adapter.origin}: the shapes do not tell which of {', '.join(leaves)} of {module} each "
        "LoRA weight belongs to; merge it with PEFT and consolidate the result"
    )


def _may_be(shape: tuple[int, ...], of: Factors) -> bool:
    ends = (of.b.shape[0], of.a.shape[1])
    return ends == shape[-2:] or (len(shape) == 3 and ends == shape[:0:-1])


def _targeted(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _bare(module: str) -> str:
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module
