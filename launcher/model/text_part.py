"""Which modules of a composite compute nothing for text: vision and audio towers, projectors.

They are neither trained nor adapted if a composite is trained as its own class (Gemma 3): an
optimizer with weight decay would change them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launcher.errors import UserError
from launcher.io.module_paths import begins
from launcher.model.peft import PeftModel

TEXT_INPUTS = ("input_ids", "inputs_embeds", "inputs")


def non_text_paths(model: nn.Module) -> list[str]:
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
        if not name or isinstance(module, nn.ModuleList | nn.ModuleDict):  # only containers
            continue
        own = {id(p) for p in module.parameters()}
        has_tower = is_part or any(is_within(tower, [name]) for tower in towers)
        if own and own.isdisjoint(text) and has_tower and not is_within(name, found):
            found.append(name)
    return found


def non_text_modules(model: Any) -> list[nn.Module]:
    """The modules at `non_text_paths`, also of a model with an adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [base.get_submodule(path) for path in non_text_paths(base)]


def refuse_non_text(setting: str, name: str, found: list[str], non_text: Collection[str]) -> None:
    """Raises UserError if text reaches none of the modules `found` that `name` selects in
    `setting`. `non_text`: see `non_text_paths`."""
    if found and all(is_within(path, non_text) for path in found):
        raise UserError(
            f"{setting}: {name} is only in {found[0]}, which text does not pass through, so it "
            "would not learn → modules of the text model"
        )


def without_gradient(model: nn.Module) -> list[str]:
    """The paths of modules with parameters that compute under torch.no_grad, such as the indexers
    that select the tokens of a sparse attention: a loss does not train them."""
    return [
        name
        for name, module in model.named_modules()
        if name and _is_no_grad(module) and next(module.parameters(), None) is not None
    ]


def _is_no_grad(module: nn.Module) -> bool:
    """Whether the forward of its class is decorated with torch.no_grad."""
    cells = getattr(type(module).forward, "__closure__", None) or ()
    owners = (getattr(cell.cell_contents, "__self__", None) for cell in cells)
    return any(isinstance(owner, torch.no_grad) for owner in owners)


def is_within(name: str, paths: Collection[str]) -> bool:
    """Whether a module or parameter is one of `paths` or inside one."""
    return any(begins(name, path) for path in paths)


def _is_tower(module: Any) -> bool:
    """Whether the module reads pictures or sound."""
    return isinstance(module, PreTrainedModel) and module.main_input_name not in TEXT_INPUTS
