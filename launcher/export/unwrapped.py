"""Takes off the names of tensors what a trainer's own module around the model put before them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.export.assembled import Config, Tensors
from launcher.export.completeness import BESIDE, class_naming
from launcher.export.names.wrapper import are_on_disk, common_prefixes, find_wrapper, known_names
from launcher.folders.json_file import is_text
from launcher.io.adapter import PREFIX, Adapter, plain_name
from launcher.io.places import Places
from launcher.io.readers.found import FoundModel

ADAPTER_PART = r"(\.base_layer)*\.(lora_|token_adapter\.).*"


def unwrapped_folder(folder: Path, config: Config, tensors: Tensors) -> Tensors:
    """The tensors of a model folder, by the names of its class. `folder`: for messages."""
    return _without(_wrapper(folder, config, tensors, {}, None), tensors)


def unwrapped_state(
    folder: Path, config: Config, base: Tensors, found: FoundModel, places: Places | None
) -> FoundModel:
    """A checkpoint, without its adapter, by the names of the base or of its class. `places`: of
    the model that was trained alone, if it was."""
    wrapper = _wrapper(folder, config, found.tensors, base, places)
    if not wrapper:
        return found
    return replace(
        found,
        tensors=_without(wrapper, found.tensors),
        aliases={
            n.removeprefix(wrapper): o.removeprefix(wrapper) for n, o in found.aliases.items()
        },
        trained=found.trained
        and frozenset(plain_name(name).removeprefix(wrapper) for name in found.trained),
    )


def unwrapped_adapter(
    folder: Path, config: Config, base: Tensors, adapter: Adapter, places: Places | None
) -> Adapter:
    """An adapter, whose tensors have their names in PEFT's files, which begin with PREFIX. Modules
    that its settings name by their whole path are renamed, too."""
    short = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.tensors.items()}
    weights = {re.sub(ADAPTER_PART, ".weight", name) for name in short}
    wrapper = _wrapper(folder, config, weights, base, places)
    if not wrapper:
        return adapter
    renamed = {PREFIX + name.removeprefix(wrapper): tensor for name, tensor in short.items()}
    settings = {key: _without_wrapper(value, wrapper) for key, value in adapter.config.items()}
    tensors = {name: tensor.renamed(name) for name, tensor in renamed.items()}
    return replace(adapter, config=settings, tensors=tensors)


def _without_wrapper(setting: Any, wrapper: str) -> Any:
    """A list of modules, or a table by modules, without `wrapper` before their paths."""
    if isinstance(setting, list):
        return [each.removeprefix(wrapper) if is_text(each) else each for each in setting]
    if isinstance(setting, dict):
        return {key.removeprefix(wrapper): value for key, value in setting.items()}
    return setting


def _wrapper(
    folder: Path, config: Config, names: Collection[str], base: Tensors, places: Places | None
) -> str:
    """The prefix of all `names`, "" if there is none. transformers, which takes seconds to import,
    is asked for the class if the names are not those of the base."""
    names = [name for name in names if not re.search(BESIDE, name)]
    if next(common_prefixes(names), None) is None:
        return ""
    if any(name in base for name in names) or (naming := class_naming(folder, config)) is None:
        return find_wrapper(names, base)
    if are_on_disk(names, naming):
        return ""
    known = known_names(naming) | base.keys()
    return find_wrapper(names, known | ({*map(places.inner, naming.shapes)} if places else set()))


def _without(prefix: str, tensors: Tensors) -> Tensors:
    if not prefix:
        return tensors
    short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {name: tensor.renamed(name) for name, tensor in short.items()}
