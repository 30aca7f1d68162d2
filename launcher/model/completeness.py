"""Whether the files of a model folder have every tensor of the model that config.json describes.

transformers fills a parameter that the files lack with random values, and only logs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.folders.vocabulary import HEAD_MODULES
from launcher.io.completeness import tied_names
from launcher.io.weight_views import LazyWeight
from launcher.model.lazy_weight import InParts

CHUNK_ELEMENTS = 2**24  # of each tensor, in memory while two are compared
MAX_NAMES = 3  # that a message lists


def check_ties(
    model: Any, weights: Mapping[str, LazyWeight], folder: Path, in_parts: InParts
) -> None:
    """Raises UserError if the model ties two parameters that differ in the files.

    `weights`: those that the files have, by name in memory. Collective if ranks share the work.
    """
    for target, source in tied_names(model).items():
        if {target, source} <= weights.keys() and not _same_values(
            weights[target], weights[source], in_parts
        ):
            raise untied_error(folder, target, source)


def check_loaded(ties: dict[str, str], loaded: Any, info: dict[str, Any], folder: Path) -> None:
    """The checks of a model that transformers has loaded.

    `ties` are those of the config, of which transformers drops the ones that the files contradict.
    `info` is its loading info. Raises UserError.
    """
    missing = set(info["missing_keys"])
    refuse_missing((name for name in missing if ties.get(name) not in missing), folder)
    refuse_mismatched(sorted(info["mismatched_keys"]), folder)
    for target, source in ties.items():
        if target not in loaded.all_tied_weights_keys:
            raise untied_error(folder, target, source)


def refuse_mismatched(
    mismatched: Iterable[tuple[str, torch.Size, torch.Size]], folder: Path
) -> None:
    """Raises UserError if there are any: name, shape in the files, shape in memory."""
    for name, in_file, in_model in mismatched:
        raise UserError(
            f"model.name_or_path={folder}: {name} has the shape {list(in_file)} in the files, but "
            f"config.json describes {list(in_model)} → all files of the model, and the config.json "
            "that belongs to them"
        )


def refuse_unfit(unfit: Mapping[str, str], folder: Path) -> None:
    """Raises UserError if there are any: name in memory → why it cannot be made of the files."""
    for name, reason in sorted(unfit.items()):
        more = f" ({len(unfit)} such parameters)" if len(unfit) > 1 else ""
        raise UserError(
            f"model.name_or_path={folder}: {name} cannot be made of {reason} in the files{more}: "
            "some are missing or damaged → a folder with all tensors"
        )


def refuse_missing(names: Iterable[str], folder: Path, unused: Iterable[str] = ()) -> None:
    """Raises UserError if there are `names`: parameters that the files lack. `unused`: the stored
    tensors that the model does not have."""
    missing = sorted(names)
    if not missing:
        return
    is_head = any(HEAD_MODULES & {*name.split(".")} for name in missing)
    tie = f", or tie_word_embeddings=true in {folder}/config.json if the head is the embedding"
    more = f" and {len(missing) - MAX_NAMES} more" if len(missing) > MAX_NAMES else ""
    lacks = f"the files contain no {', '.join(missing[:MAX_NAMES])}{more}"
    if other := _under_another_prefix(missing, unused):
        raise UserError(
            f"model.name_or_path={folder}: {lacks}, but {other} → the config.json that belongs to "
            f"the files; if a wrapper prefixed the names, shardway consolidate {folder} --output "
            "DIR removes that"
        )
    raise UserError(
        f"model.name_or_path={folder}: {lacks}, which would be random → a folder with all "
        f"tensors{tie * is_head}"
    )


def _under_another_prefix(missing: list[str], unused: Iterable[str]) -> str | None:
    """A stored tensor that has the name of one of `missing`, but for the first parts."""
    stored = sorted(unused)
    for name in missing:
        ends = [name, name.partition(".")[2]]
        for end in (end for end in ends if end.count(".") > 0):
            if found := next((other for other in stored if other.endswith(f".{end}")), None):
                return found
    return None


def untied_error(folder: Path, target: str, source: str) -> UserError:
    """For two parameters that the config ties and that differ in the files."""
    return UserError(
        f"model.name_or_path={folder}: {target} differs from {source} in the files, but "
        f"config.json ties them, so one of them would be lost → tie_word_embeddings=false in "
        f"{folder}/config.json"
    )


def _same_values(one: LazyWeight, other: LazyWeight, in_parts: InParts) -> bool:
    shape = tuple(one.shape)
    if shape != tuple(other.shape):
        return False
    at_once = max(1, CHUNK_ELEMENTS // max(1, one.shape[1:].numel()))

    def same_rows(begin: int, count: int) -> torch.Tensor:
        """1 for each row that is the same."""
        same = torch.zeros(count, dtype=torch.uint8)
        for first in range(0, count, at_once):
            rows = min(at_once, count - first)
            offsets, box = (begin + first, *(0 for _ in shape[1:])), (rows, *shape[1:])
            left, right = one.read(offsets, box), other.read(offsets, box)
            equal = left.to(right.dtype) == right
            same[first : first + rows] = equal.flatten(1).all(1) if shape[1:] else equal
        return same

    return bool(in_parts(shape[0], same_rows).all())
