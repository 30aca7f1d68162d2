"""Moves an adapter between a model that is trained alone and the composite that contains it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from launcher.io.adapter import PREFIX, Adapter
from launcher.io.adapter_config import module_value
from launcher.io.model_class import Places

T = TypeVar("T")
Rename = Callable[[str], str]
LORA = re.compile(r"(.+?)(?:\.base_layer)*\.lora_\w+(?:\.\w+)?")
PATTERNS = ("rank_pattern", "alpha_pattern")
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
CHANGED_SETTINGS = (
    *("target_modules", "modules_to_save", "trainable_token_indices"),
    *PATTERNS,
    *NARROWING,
)


def in_composite(adapter: Adapter, places: Places | None) -> Adapter:
    """`adapter` by the composite's names. It is returned as it is if it has them, or if there is no
    composite (`places` is None)."""
    names = [name.removeprefix(PREFIX) for name in adapter.tensors]
    if places is None or any(places.is_outer(name) for name in names):
        return adapter
    tensors = outer_tensors(adapter.tensors, places)
    return replace(
        adapter,
        config=outer_settings(adapter.config, adapter.tensors, places),
        tensors={name: tensor.renamed(name) for name, tensor in tensors.items()},
    )


def outer_tensors(tensors: Mapping[str, T], places: Places) -> dict[str, T]:
    """The tensors of an adapter, under their names in PEFT's files, by the composite's names."""
    return _renamed(tensors, places.outer)


def inner_tensors(tensors: Mapping[str, T], places: Places) -> dict[str, T]:
    """The reverse: by the names of the model that is trained alone."""
    return _renamed(tensors, places.inner)


def outer_settings(
    settings: Mapping[str, Any], tensors: Iterable[str], places: Places
) -> dict[str, Any]:
    """adapter_config.json for the composite: it adapts the same modules as before, and no module of
    the same ending in a vision tower. `tensors`: the names before."""
    return _settings(settings, tensors, places.outer, places.others)


def inner_settings(
    settings: Mapping[str, Any], tensors: Iterable[str], places: Places
) -> dict[str, Any]:
    """The reverse: for the model that is trained alone. `tensors`: the names before."""
    return _settings(settings, tensors, places.inner, ())


def _renamed(tensors: Mapping[str, T], rename: Rename) -> dict[str, T]:
    return {PREFIX + rename(name.removeprefix(PREFIX)): each for name, each in tensors.items()}


def _settings(
    settings: Mapping[str, Any], tensors: Iterable[str], rename: Rename, others: Collection[str]
) -> dict[str, Any]:
    """`settings` with the modules renamed. Servers read lists of names only: a pattern, or endings
    that match one of `others`, become the paths of the adapted modules."""
    found = (LORA.fullmatch(name.removeprefix(PREFIX)) for name in tensors)
    adapted = sorted({match[1] for match in found if match})
    result = dict(settings)
    targets = settings.get("target_modules") or []
    is_list = not isinstance(targets, str)
    narrowed = any(settings.get(key) for key in NARROWING)
    if is_list and not narrowed and not any(_is_target(name, targets) for name in others):
        result["target_modules"] = sorted(rename(t) if t in adapted else t for t in targets)
    else:
        chosen = (name for name in adapted if _is_target(name, targets))
        result["target_modules"] = sorted(map(rename, chosen))
        result |= {key: None for key in NARROWING if settings.get(key)}
    for key in PATTERNS:
        values = {name: module_value(settings, key, name, None) for name in adapted}
        if settings.get(key):
            result[key] = {rename(name): v for name, v in values.items() if v is not None}
    if isinstance(tokens := settings.get("trainable_token_indices"), dict):
        result["trainable_token_indices"] = {_path(key, rename): v for key, v in tokens.items()}
    if saved := settings.get("modules_to_save"):
        result["modules_to_save"] = [_path(name, rename) for name in saved]
    return result


def _path(name: str, rename: Rename) -> str:
    """An ending of one module's path is that of its new path, too."""
    return rename(name) if "." in name else name


def _is_target(module: str, targets: str | Iterable[str]) -> bool:
    """Whether PEFT adapts the module (`check_target_module_exists`)."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)
