"""Which modules of a composite no text passes through: vision towers, projectors.

A composite whose causal class is its own (Gemma 3) is trained whole. Its towers compute nothing for
text, so they are neither trained nor adapted: an optimizer with weight decay would change them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from launcher.model.peft import PeftModel

TEXT_INPUTS = ("input_ids", "inputs_embeds", "inputs")


def beside_text(model: nn.Module) -> list[str]:
    """The paths of the outermost modules with parameters that text does not reach."""
    if not isinstance(model, PreTrainedModel):
        return []
    decoder = model.get_decoder()
    is_part = model.config.get_text_config(decoder=True) is not model.config
    towers = [name for name, module in model.named_modules() if _is_tower(module)]
    if not is_part and not towers:
        return []
    kept = [model.get_input_embeddings(), model.get_output_embeddings()]
    kept += [decoder] if is_part else []
    text = {id(p) for module in kept if module is not None for p in module.parameters()}
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):  # only a container
            continue
        own = {id(p) for p in module.parameters()}
        has_tower = is_part or any(is_inside(tower, [name]) for tower in towers)
        if own and own.isdisjoint(text) and has_tower and not is_inside(name, found):
            found.append(name)
    return found


def modules_beside_text(model: Any) -> list[nn.Module]:
    """These modules, also of a model with an adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [base.get_submodule(path) for path in beside_text(base)]


def is_inside(name: str, paths: Collection[str]) -> bool:
    """Whether a module or parameter is one of `paths` or inside one."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def _is_tower(module: Any) -> bool:
    """Whether the module reads pictures or sound."""
    return isinstance(module, PreTrainedModel) and module.main_input_name not in TEXT_INPUTS
