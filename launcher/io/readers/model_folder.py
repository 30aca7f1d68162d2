"""Reads a plain Hugging Face folder: safetensors or torch files, one or several with an index."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.model import is_weights_file, single_weights_file
from launcher.folders.tensor_entries import check_index, read_weight_map
from launcher.folders.unknown_source import explain
from launcher.folders.unreadable import reason_unreadable
from launcher.io.readers.found import FoundModel
from launcher.io.readers.safetensors_file import read_header
from launcher.io.readers.torch_file import read_file, tensors_in
from launcher.io.readers.wrapper_prefixes import (
    skipped_note,
    under_model_key,
    with_stripped_names,
)
from launcher.io.tensor import InMemory, Tensor
from launcher.io.tensor.stored import Stored

TORCH_FILES = ("pytorch_model.bin", "pytorch_model_fsdp.bin")
Reader = Callable[[Path], dict[str, Tensor]]


def read_model(folder: Path) -> FoundModel:
    """All tensors that the folder's index lists, or those of its only weights file. Safetensors
    take precedence over torch files.

    Raises UserError if a file is missing or damaged, or if the index and the files disagree.
    """
    if index := _index(folder, "safetensors"):
        tensors, not_weights = with_stripped_names(_read_by_index(index, read_header), folder)
        return FoundModel(tensors, notes=not_weights)
    if _weights(folder, "safetensors"):
        state = read_header(single_weights_file(folder))
        tensors, not_weights = with_stripped_names(state, folder)
        return FoundModel(tensors, notes=not_weights)
    notes: list[str] = []
    if index := _index(folder, "bin"):
        state = _read_by_index(index, lambda file: _state_dict(file, notes))
    else:
        state = _state_dict(_only_torch_file(folder), notes)
    tensors, not_weights = with_stripped_names(state, folder)
    aliases = find_aliases(tensors)
    unique = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    return FoundModel(unique, aliases, (*notes, *not_weights))


def find_aliases(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name → the earlier name of a tensor in the same storage: tied weights share one."""
    first: dict[Hashable, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if (storage := _storage_key(tensor)) is None:
            continue
        if (earlier := first.setdefault(storage, name)) != name:
            aliases[name] = earlier
    return aliases


def _storage_key(tensor: Tensor) -> Hashable | None:
    """Equal for tensors that are read from the same bytes; None for a tensor without elements."""
    if not tensor.nbytes:
        return None
    if isinstance(tensor, Stored):
        return tensor.pieces, tensor.dtype, tensor.shape
    if isinstance(tensor, InMemory):
        values = tensor.values
        return tensor.origin, values.data_ptr(), values.dtype, values.shape, values.stride()
    return tensor.renamed("")


def _index(folder: Path, extension: str) -> Path | None:
    stem = {"safetensors": "model", "bin": "pytorch_model"}[extension]
    default = folder / f"{stem}.{extension}.index.json"
    indexes = sorted(folder.glob(f"*.{extension}.index.json"))
    if len(indexes) > 1 and default not in indexes:
        raise UserError(f"{folder} contains {len(indexes)} indexes, and none is {default.name}")
    return default if default in indexes else next(iter(indexes), None)


def _weights(folder: Path, extension: str) -> list[Path]:
    return [path for path in sorted(folder.glob(f"*.{extension}")) if is_weights_file(path.name)]


def _only_torch_file(folder: Path) -> Path:
    files = _weights(folder, "bin")
    default = [folder / name for name in TORCH_FILES if folder / name in files]
    if default or len(files) == 1:
        return [*default, *files][0]
    if not files:
        raise UserError(f"{folder} {explain(folder)}")
    raise UserError(
        f"{folder} contains {len(files)} .bin files and neither pytorch_model.bin nor an index: it "
        "is unclear which of them are the model"
    )


def _state_dict(file: Path, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of a torch file, with or without an entry such as "state_dict" around them. A
    note on what is not a tensor is added to `notes`."""
    content = read_file(file)
    if isinstance(content, dict):
        content = under_model_key(content)
    tensors, other_names = tensors_in(content, file)
    if not tensors:
        raise UserError(f"{file} contains no tensors by name: it is not a model")
    notes += skipped_note(other_names, f"of {file.name} that are not tensors")
    return tensors


def _read_by_index(index: Path, read: Reader) -> dict[str, Tensor]:
    """Every tensor that the index lists, from the file it names, in the order of the index."""
    weight_map = read_weight_map(index)
    files = sorted(set(weight_map.values()))
    _check_listed(index, files)
    contents = {name: read(index.parent / name) for name in files}
    check_index(index, weight_map, contents)
    return {name: contents[file][name] for name, file in weight_map.items()}


def _check_listed(index: Path, names: list[str]) -> None:
    """Raises UserError if a file that the index names is not there. Links are followed: the files
    of a hub cache are links to another folder."""
    missing = [name for name in names if not (index.parent / name).is_file()]
    if not missing:
        return
    file = index.parent / missing[0]
    if file.is_symlink():
        raise UserError(f"{file} {reason_unreadable(file)}")
    raise UserError(
        f"{file} is missing; {index.name} lists it ({len(missing)} of {len(names)} files are "
        "missing) → the same download or copy once more"
    )
