"""A plain Hugging Face folder: safetensors or torch files, one or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.errors import UserError
from launcher.export.readers.found import Found
from launcher.export.readers.prefixes import dropped, with_clean_names
from launcher.export.readers.safetensors_file import read_header
from launcher.export.readers.torch_file import read_file, tensors_in
from launcher.export.tensor import Held, Tensor
from launcher.export.tensor.stored import Stored
from launcher.model.folder import the_safetensors_file

KIND = "Hugging Face folder"
NOT_MODELS = ("adapter_model", "training_args", "optimizer", "scheduler", "random_states")
TORCH_FILES = ("pytorch_model.bin", "pytorch_model_fsdp.bin")
Reader = Callable[[Path], dict[str, Tensor]]


def recognises(folder: Path) -> bool:
    """Whether weights lie in `folder` itself, by the names of its files."""
    return any(
        _weights(folder, kind) or any(folder.glob(f"*.{kind}.index.json"))
        for kind in ("safetensors", "bin")
    )


def read_model(folder: Path) -> Found:
    """All tensors that the folder's index lists, or of its one file; safetensors come first.

    Raises UserError when a file is missing or damaged, or the index and the files disagree.
    """
    if index := _index(folder, "safetensors"):
        return Found(_by_index(index, read_header))
    if _weights(folder, "safetensors"):
        return Found(read_header(the_safetensors_file(folder)))
    notes: list[str] = []
    if index := _index(folder, "bin"):
        raw = _by_index(index, lambda file: _state_dict(file, notes))
    else:
        raw = _state_dict(_the_torch_file(folder), notes)
    tensors = with_clean_names(raw, folder)
    aliases = shared(tensors)
    kept = {name: each for name, each in tensors.items() if name not in aliases}
    return Found(kept, aliases, tuple(notes))


def shared(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name → the earlier name of the very same values: tied weights are one storage."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if (place := _place(tensor)) is None:
            continue
        if (kept := first.setdefault(place, name)) != name:
            aliases[name] = kept
    return aliases


def _place(tensor: Tensor) -> Any:
    if not tensor.nbytes:
        return None
    if isinstance(tensor, Stored):
        return tensor.pieces, tensor.dtype, tensor.shape
    if isinstance(tensor, Held):
        values = tensor.values
        return tensor.origin, values.data_ptr(), values.dtype, values.shape, values.stride()
    return tensor.called("")


def _index(folder: Path, kind: str) -> Path | None:
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    named = folder / f"{stem}.{kind}.index.json"
    found = sorted(folder.glob(f"*.{kind}.index.json"))
    if len(found) > 1 and named not in found:
        raise UserError(f"{folder} holds {len(found)} indexes, and none is named {named.name}")
    return named if named in found else next(iter(found), None)


def _weights(folder: Path, kind: str) -> list[Path]:
    return [
        path for path in sorted(folder.glob(f"*.{kind}")) if not path.name.startswith(NOT_MODELS)
    ]


def _the_torch_file(folder: Path) -> Path:
    files = _weights(folder, "bin")
    named = [folder / name for name in TORCH_FILES if folder / name in files]
    if named or len(files) == 1:
        return [*named, *files][0]
    raise UserError(
        f"{folder} holds {len(files)} .bin files and neither pytorch_model.bin nor an index: which "
        "of them are the model cannot be told"
    )


def _state_dict(file: Path, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of a torch file, nested under "state_dict" or not."""
    content = read_file(file)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors, others = tensors_in(content, file)
    if not tensors:
        raise UserError(f"{file} holds no tensors by name: it is no model")
    notes += dropped(others, f"of {file.name} that are no tensors")
    return tensors


def _by_index(index: Path, read: Reader) -> dict[str, Tensor]:
    """Every tensor that the index lists, from the file it names, in the order of the index."""
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    held_by = {name: read(_listed(index, name)) for name in files}
    holder: dict[str, str] = {}
    for file, tensors in held_by.items():
        for name in tensors:
            if name in holder:
                raise UserError(
                    f"{name} is in both {holder[name]} and {file} of {index.parent}: which of them "
                    "is the model's cannot be told"
                )
            holder[name] = file
    if lost := sorted(name for name, file in weight_map.items() if holder.get(name) != file):
        raise UserError(
            f"{index} lists {lost[0]} ({len(lost)} such tensors) in {weight_map[lost[0]]}, which "
            "does not hold it: the index is stale"
        )
    if extra := sorted(holder.keys() - weight_map.keys()):
        raise UserError(
            f"{index.parent / holder[extra[0]]} holds {extra[0]} ({len(extra)} such), which "
            f"{index.name} does not list: the index is stale"
        )
    return {name: held_by[file][name] for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no index of weights: {error!r}") from error
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index} lists no tensors")
    return {str(name): str(file) for name, file in found.items()}


def _listed(index: Path, name: str) -> Path:
    """The file that the index names. Files of a hub cache are links that lead elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{index} lists {name}, which is outside the folder")
    if not (file := index.parent / path).is_file():
        raise UserError(f"{file} is missing; {index.name} lists it")
    return file
