"""Whether the tensors of a model folder are those of the class that its config.json names.

transformers fills a parameter that is missing with random values, and servers refuse the folder.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export import names
from launcher.export.quantized.released import PART
from launcher.folders.brief import listed
from launcher.folders.quantization import quantization_of
from launcher.io.adapter import is_peft_state
from launcher.io.completeness import missing_parameters
from launcher.io.readers.wrapper_prefixes import skipped_note
from launcher.io.tensor import Tensor

LISTED = 3  # names in a message
# TRL's value head, and buffers that older versions of transformers saved.
VALUE_HEAD = r"^v_head\."
BESIDE = rf"{VALUE_HEAD}|\.rotary_emb\.inv_freq$"


def check_complete(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Compare names and shapes on disk with the class's, which is built without data.

    Returns a note if they cannot be compared. Raises UserError for a parameter that is missing or
    has another shape. `folder`: for messages.
    """
    if reason := _not_comparable(config, tensors):
        return (f"the tensors were not compared with those of the model: {reason}",)
    naming = _class_naming(folder, json.dumps(config, sort_keys=True))
    memory = naming.to_memory(dict(tensors))
    missing = [
        name
        for name in missing_parameters(naming.model, memory.keys())
        if name not in naming.optional
    ]
    class_name = type(naming.model).__name__
    unknown = sorted(memory.keys() - naming.shapes.keys())
    if adapted := [name for name in unknown if is_peft_state([name], adapted=True)]:
        raise UserError(
            f"{folder} contains {len(adapted)} tensor(s) of an adapter that is not merged "
            f"({adapted[0]}) → its adapter_config.json beside them, or --alpha ALPHA"
        )
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        unknown = unknown[:LISTED]
        renamed = f" (of other names: {', '.join(unknown)})" if unknown else ""
        raise UserError(
            f"{folder} lacks {', '.join(missing[:LISTED])}{more} of {class_name}, the class that "
            f"config.json names{renamed}; use the complete files of the model"
        )
    for name, shape in naming.shapes.items():
        if name in memory and memory[name].shape != shape:
            raise UserError(
                f"{folder}: {name} has the shape {list(memory[name].shape)}, but in {class_name} "
                f"by config.json it has {list(shape)}; use the config.json that belongs to the "
                "files"
            )
    return ()


def known_tensors(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(those of a checkpoint's tensors that belong to the class of `config`, notes on the others).

    What trainers put beside a model (a value head, buffers that are computed) is left out. Tensors
    that training added to a module of the class stay. Raises UserError for others: it is not known
    what they are. Without a class that is known here, all are returned.
    """
    if (naming := class_naming(folder, config, tensors)) is None:
        return dict(tensors), ()
    class_name = type(naming.model).__name__
    patterns = naming.model._keys_to_ignore_on_load_unexpected or ()
    apart = {name for name, memory, *_ in naming.renamed(tensors) if memory not in naming.shapes}
    beside = {name for name in apart if re.search(BESIDE, name)}
    added = {n for n in apart - beside if not any(re.search(each, n) for each in patterns)}
    if unknown := sorted(name for name in added if not _is_in_module(naming.model, name)):
        raise UserError(
            f"{folder} contains {len(unknown)} tensor(s) that {class_name}, the class of "
            f"config.json, does not have ({listed(unknown, LISTED)}) → --base FOLDER, if "
            "the base has them; otherwise save the state of the model alone"
        )
    notes = skipped_note(beside, f"that {class_name} does not have")
    if added:
        notes += (
            f"{len(added)} tensor(s) that {class_name} does not have are exported with the module "
            f"that has them: {min(added)}",
        )
    return {name: tensor for name, tensor in tensors.items() if name not in beside}, notes


def without_value_head(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the tensors of a model folder without TRL's value head, which no server loads; a note). A
    class with a module of that name keeps it."""
    heads = {name for name in tensors if re.search(VALUE_HEAD, name)}
    if not heads or (naming := class_naming(folder, config, tensors)) is None:
        return dict(tensors), ()
    heads -= naming.shapes.keys()
    notes = skipped_note(heads, f"that {type(naming.model).__name__} does not have")
    return {name: tensor for name, tensor in tensors.items() if name not in heads}, notes


def _is_in_module(model: Any, name: str) -> bool:
    """Whether a tensor of this name is part of a module of the model, and not of one more layer."""
    modules = dict(model.named_modules())
    path = name.rpartition(".")[0]
    while path not in modules:
        path = path.rpartition(".")[0]
    return path != "" and not isinstance(modules[path], torch.nn.ModuleList)


def class_naming(
    folder: Path, config: dict[str, Any], tensors: Iterable[str] = ()
) -> names.Naming | None:
    """The naming of the class that `config` names; None: it is not known here, or some of `tensors`
    are quantized. `folder`: for messages."""
    if _not_comparable(config, tensors):
        return None
    return _class_naming(folder, json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=2)  # a checkpoint is compared before and after it is assembled
def _class_naming(folder: Path, config: str) -> names.Naming:
    return names.naming_of_config(folder, json.loads(config))


def _not_comparable(config: dict[str, Any], tensors: Iterable[str]) -> str | None:
    """Why the class is not known here, None if it is."""
    import transformers

    if quantization_of(config) or any(PART.fullmatch(name) for name in tensors):
        return "they are quantized"
    if not config.get("architectures"):
        return "config.json names no class (architectures)"
    model_type, architecture = config.get("model_type"), config["architectures"][0]
    if model_type not in transformers.CONFIG_MAPPING or not hasattr(transformers, architecture):
        return f"transformers {transformers.__version__} does not have {architecture}"
    return None
