"""Whether the files of a model folder have every tensor of the model that config.json describes.

transformers fills a parameter that the files lack with random values, and only logs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from launcher.errors import UserError
from launcher.folders.vocabulary import HEAD_MODULES
from launcher.io.completeness import missing_parameters, tied_names
from launcher.model.lazy_weight import LazyWeight

CHUNK_ELEMENTS = 2**24  # of each tensor, in memory while two are compared
MAX_NAMES = 3  # that a message lists


class NamedWeights(Protocol):
    """The tensors of a model folder."""

    @property
    def names(self) -> set[str]: ...

    def __getitem__(self, name: str) -> LazyWeight: ...


def check_ties(model: Any, files: NamedWeights, folder: Path) -> None:
    """Raises UserError if the model ties two parameters that differ in the files."""
    for target, source in tied_names(model).items():
        if {target, source} <= files.names and not _same_values(files[target], files[source]):
            raise untied_error(folder, target, source)


def check_names(model: Any, files: NamedWeights, folder: Path) -> None:
    """Raises UserError if the files lack a parameter.

    If they contain names that the model does not have, transformers may rename or combine tensors
    while it loads them: only `check_loaded` can tell then.
    """
    state = model.state_dict().keys()
    if files.names - state:
        return
    refuse_missing(missing_parameters(model, files.names), folder)


def check_loaded(ties: dict[str, str], loaded: Any, info: dict[str, Any], folder: Path) -> None:
    """The same checks after transformers has loaded the model.

    `ties` are those of the config, of which transformers drops the ones that the files contradict.
    `info` is its loading info. Raises UserError.
    """
    missing = set(info["missing_keys"])
    refuse_missing((name for name in missing if ties.get(name) not in missing), folder)
    for name, in_file, in_model in sorted(info["mismatched_keys"]):
        raise UserError(
            f"model.name_or_path={folder}: {name} has the shape {list(in_file)} in the files, but "
            f"config.json describes {list(in_model)} → the config.json that belongs to the files"
        )
    for target, source in ties.items():
        if target not in loaded.all_tied_weights_keys:
            raise untied_error(folder, target, source)


def refuse_missing(names: Iterable[str], folder: Path) -> None:
    """Raises UserError if there are `names`: parameters that the files lack."""
    missing = sorted(names)
    if not missing:
        return
    is_head = any(HEAD_MODULES & {*name.split(".")} for name in missing)
    tie = f", or tie_word_embeddings=true in {folder}/config.json if the head is the embedding"
    more = f" and {len(missing) - MAX_NAMES} more" if len(missing) > MAX_NAMES else ""
    raise UserError(
        f"model.name_or_path={folder}: the files contain no {', '.join(missing[:MAX_NAMES])}{more},"
        f" which would be random → a folder with all tensors{tie * is_head}"
    )


def untied_error(folder: Path, target: str, source: str) -> UserError:
    """For two parameters that the config ties and that differ in the files."""
    return UserError(
        f"model.name_or_path={folder}: {target} differs from {source} in the files, but "
        f"config.json ties them, so one of them would be lost → tie_word_embeddings=false in "
        f"{folder}/config.json"
    )


def _same_values(one: LazyWeight, other: LazyWeight) -> bool:
    shape = tuple(one.shape)
    if shape != tuple(other.shape):
        return False
    rows = max(1, CHUNK_ELEMENTS // max(1, one.shape[1:].numel()))
    for first in range(0, shape[0], rows):
        offsets = (first, *(0 for _ in shape[1:]))
        box = (min(rows, shape[0] - first), *shape[1:])
        left, right = one.read(offsets, box), other.read(offsets, box)
        if not torch.equal(left.to(right.dtype), right):
            return False
    return True
