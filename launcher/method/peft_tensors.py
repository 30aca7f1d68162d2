"""The tensors of a PEFT adapter: their names in a model and in PEFT's files, and their layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.folders.adapter import SETTINGS, read_settings
from launcher.io.adapter import ADAPTER_NAME, PREFIX
from launcher.io.adapter_places import inner_tensors, outer_settings, outer_tensors
from launcher.io.model_class import places_of
from launcher.method.initial_delta import LowRankDelta, ScaledDeltas
from launcher.model.peft import LoraLayer, PeftModel, get_peft_model_state_dict
from launcher.model.text_part import is_within, non_text_paths


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers by the module's path in the base."""
    return {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def trained_deltas(model: PeftModel, tensors: dict[str, torch.Tensor]) -> ScaledDeltas:
    """The adapter of each layer, from tensors by PEFT's names."""
    return {
        name: (
            LowRankDelta(
                tensors[f"{PREFIX}{name}.lora_B.weight"], tensors[f"{PREFIX}{name}.lora_A.weight"]
            ),
            layer.scaling[ADAPTER_NAME],
        )
        for name, layer in lora_layers(model).items()
    }


def tied_names(model: PeftModel) -> dict[str, str]:
    """Another name of a trained parameter in `model` → the name that `named_parameters` gives."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        if parameter.requires_grad and canonical != name:
            names[name] = canonical
    return names


def to_peft_names(
    model: PeftModel, tensors: dict[str, torch.Tensor], tied: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Rename `tensors` from the names in `model` to those in PEFT's files, which contain a tied
    parameter under each of its names."""
    copies = {other: tensors[name] for other, name in tied.items()}
    renamed: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, state_dict=tensors | copies, save_embedding_layers=False
    )
    return renamed


def to_model_names(
    model: PeftModel, saved: dict[str, torch.Tensor], folder: Path, tied: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Rename `saved` from the names in PEFT's files to those in `model`. Raises UserError if they
    are not the tensors of its adapter."""
    placeholders = {name: torch.empty(0) for name, p in model.named_parameters() if p.requires_grad}
    # PEFT's own renaming, applied to placeholders, gives the name of each parameter in a file.
    renamed = to_peft_names(model, placeholders, tied)
    peft_names = {id(tensor): name for name, tensor in renamed.items()}
    peft_name_of = {name: peft_names[id(t)] for name, t in placeholders.items()}
    if differing := sorted(saved.keys() ^ renamed.keys()):
        raise UserError(
            f"{folder} contains a different adapter: {len(differing)} tensors are missing or "
            f"unexpected, such as {differing[0]}"
        )
    return {name: saved[peft_name] for name, peft_name in peft_name_of.items()}


def in_composite(
    model: PeftModel, tensors: dict[str, torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """`tensors`, under their names in PEFT's files, by the names of the composite that the base is
    a part of; the adapter_config.json in `folder` becomes that for the composite."""
    places = places_of(model.get_base_model())
    if places is None:
        return tensors
    file = folder / SETTINGS
    settings = outer_settings(read_settings(file), tensors, places)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True))  # as PEFT does
    return outer_tensors(tensors, places)


def in_model(model: PeftModel, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse of `in_composite`, for the tensors of a folder. They may have the names of the
    model already, as those that earlier versions wrote; these adapted towers, too, to no effect."""
    base = model.get_base_model()
    places = places_of(base)
    saved = saved if places is None else inner_tensors(saved, places)
    non_text = [PREFIX + path for path in non_text_paths(base)]
    adapted = [PREFIX + name for name in lora_layers(model)]
    return {
        name: tensor
        for name, tensor in saved.items()
        if not is_within(name, non_text) or is_within(name, adapted)
    }
