"""Moves an adapter between a model that is trained alone and the composite that contains it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from launcher.io.adapter import PREFIX, Adapter
from launcher.io.adapter_config import module_value
from launcher.io.module_paths import begins, ends_in
from launcher.io.places import Places

T = TypeVar("T")
Rename = Callable[[str], str]
LORA = re.compile(r"(.+?)(?:\.base_layer)*\.lora_\w+(?:\.\w+)?")
PATTERNS = ("rank_pattern", "alpha_pattern")
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
CHANGED_SETTINGS = (
    *("target_modules", "target_parameters", "modules_to_save", "trainable_token_indices"),
    *PATTERNS,
    *NARROWING,
)


def in_composite(adapter: Adapter, places: Places | None) -> Adapter:
    """`adapter` by the composite's names. It is returned as it is if it has them, or if there is no
    composite (`places` is None)."""
    names = (name.removeprefix(PREFIX) for name in adapter.tensors)
    if places is None or places.renaming(names) is None:
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
    names = [name.removeprefix(PREFIX) for name in tensors]
    adapted = sorted({match[1] for match in map(LORA.fullmatch, names) if match})
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
    parameters = settings.get("target_parameters") or []
    with_rank = [*adapted, *_targeted_parameters(adapted, parameters)]
    for key in PATTERNS:
        values = {name: module_value(settings, key, name, None) for name in with_rank}
        if settings.get(key):
            result[key] = {rename(name): v for name, v in values.items() if v is not None}
    if parameters:
        result["target_parameters"] = [
            rename(path) if path.rpartition(".")[0] in adapted else path for path in parameters
        ]
    if isinstance(tokens := settings.get("trainable_token_indices"), dict):
        result["trainable_token_indices"] = {
            _path(key, names, rename): v for key, v in tokens.items()
        }
    if saved := settings.get("modules_to_save"):
        full = _saved_paths(names, saved) if _is_saved_too(others, saved) else saved
        result["modules_to_save"] = [_path(name, names, rename) for name in full]
    return result


def _targeted_parameters(modules: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The paths that parameters of `modules` have if `targets` names them: PEFT looks up their
    ranks by these."""
    leaves = {target.rpartition(".")[2] for target in targets}
    paths = (f"{module}.{leaf}" for module in modules for leaf in sorted(leaves))
    return [path for path in paths if _is_target(path, targets)]


def _is_saved_too(others: Collection[str], saved: Iterable[str]) -> bool:
    """Whether PEFT would also train one of `others`: it compares the ends of paths."""
    return any(path.endswith(name) for path in others for name in saved)


def _saved_paths(tensors: Iterable[str], saved: Iterable[str]) -> list[str]:
    """The paths of the modules that `saved` names, by the names of the tensors in them."""
    parts = (name.split(".") for name in tensors if not LORA.fullmatch(name))
    paths = (".".join(each[:count]) for each in parts for count in range(1, len(each)))
    found = {path for path in paths if any(path.endswith(name) for name in saved)}
    return sorted(path for path in found if path.rpartition(".")[0] not in found)


def _path(path: str, tensors: Iterable[str], rename: Rename) -> str:
    """The new path of a module. An ending of one path is that of the new path, too; `tensors`, by
    the names before, show which of both it is."""
    return rename(path) if any(begins(name, path) for name in tensors) else path


def _is_target(module: str, targets: str | Iterable[str]) -> bool:
    """Whether PEFT adapts the module (`check_target_module_exists`)."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(ends_in(module, target) for target in targets)
