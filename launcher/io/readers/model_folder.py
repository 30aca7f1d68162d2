"""Reads a plain Hugging Face folder: safetensors or torch files, one or several with an index."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.file_names import is_weights_file, parts_of_one_model
from launcher.folders.model import single_weights_file
from launcher.folders.tensor_entries import check_index, read_weight_map
from launcher.folders.unknown_source import explain
from launcher.folders.unreadable import reason_unreadable
from launcher.io.readers.found import FoundModel
from launcher.io.readers.nesting import model_dict, model_tensors
from launcher.io.readers.safetensors_file import read_header
from launcher.io.readers.torch_file import not_a_state_dict, read_file
from launcher.io.readers.wrapper_prefixes import skipped_note, with_stripped_names
from launcher.io.tensor import InMemory, Tensor
from launcher.io.tensor.stored import Stored

TORCH_FILES = ("pytorch_model.bin", "pytorch_model_fsdp.bin")
Reader = Callable[[Path], dict[str, Tensor]]


def read_model(folder: Path, key: str | None = None) -> FoundModel:
    """All tensors that the folder's index lists, or those of its only weights file, or of files
    that are numbered as the parts of one model. Safetensors take precedence over torch files.

    `key`: under which key the model is, if a file contains several (`nesting.find_model`). Raises
    UserError if a file is missing or damaged, or if the index and the files disagree.
    """
    extension = "safetensors" if _has_safetensors(folder) else "bin"
    notes: list[str] = []
    by_name = key  # of models that are not nested

    def read(file: Path) -> dict[str, Tensor]:
        nonlocal by_name
        if extension == "safetensors":
            return read_header(file)
        tensors, by_name = _state_dict(file, key, notes)
        return tensors

    if index := _index(folder, extension):
        state = _read_by_index(index, read)
    else:
        files = _files_without_index(folder, extension)
        if len(files) > 1:
            notes.append(f"{folder} has no index: its {len(files)} files are those of one model")
        state = _joined(folder, {file.name: read(file) for file in files})[0]
    state, other_models = model_tensors(state, folder, by_name)
    tensors, not_weights = with_stripped_names(state, folder)
    aliases = find_aliases(tensors) if extension == "bin" else {}
    unique = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    return FoundModel(unique, aliases, (*dict.fromkeys([*notes, *other_models]), *not_weights))


def weights_files(folder: Path) -> list[Path]:
    """The files that `read_model` reads, which may be missing. Raises UserError if it is unclear
    which these are."""
    extension = "safetensors" if _has_safetensors(folder) else "bin"
    if index := _index(folder, extension):
        return [folder / name for name in sorted({*read_weight_map(index).values()})]
    return _files_without_index(folder, extension)


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


def _has_safetensors(folder: Path) -> bool:
    return bool(_index(folder, "safetensors") or _weights(folder, "safetensors"))


def _files_without_index(folder: Path, extension: str) -> list[Path]:
    files = _weights(folder, extension)
    if len(files) > 1 and parts_of_one_model(files):
        return files
    if extension == "safetensors":
        return [single_weights_file(folder)]
    default = [folder / name for name in TORCH_FILES if folder / name in files]
    if default or len(files) == 1:
        return [*default, *files][:1]
    if not files:
        raise UserError(f"{folder} {explain(folder)}")
    raise UserError(
        f"{folder} contains {len(files)} .bin files and neither pytorch_model.bin nor an index: it "
        "is unclear which of them are the model → SOURCE with the files of one model alone"
    )


def _state_dict(
    file: Path, key: str | None, notes: list[str]
) -> tuple[dict[str, Tensor], str | None]:
    """(the tensors of a torch file, with or without an entry such as "state_dict" around them; what
    of `key` is left). A note on what is not a tensor, and on other models, is added to `notes`."""
    content = read_file(file)
    if not isinstance(content, dict):
        raise not_a_state_dict(content, file)
    tensors, other_names, other_models, rest = model_dict(content, file, key)
    if not tensors:
        raise not_a_state_dict(content, file)
    notes += [*other_models, *skipped_note(other_names, f"of {file.name} that are not tensors")]
    return tensors, rest


def _read_by_index(index: Path, read: Reader) -> dict[str, Tensor]:
    """Every tensor that the index lists, from the file it names, in the order of the index."""
    weight_map = read_weight_map(index)
    files = sorted(set(weight_map.values()))
    _check_listed(index, files)
    contents = {name: read(index.parent / name) for name in files}
    check_index(index, weight_map, contents)
    return {name: contents[file][name] for name, file in weight_map.items()}


def _joined(
    folder: Path, contents: dict[str, dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the tensors of several files, name → its file). Raises UserError for one that is in two."""
    tensors: dict[str, Tensor] = {}
    file_of: dict[str, str] = {}
    for file, own in contents.items():
        if twice := sorted(own.keys() & tensors.keys()):
            raise UserError(
                f"{twice[0]} is in both {file_of[twice[0]]} and {file} of {folder}: it is unclear "
                "which of them is the model's → SOURCE without the other one"
            )
        tensors |= own
        file_of |= dict.fromkeys(own, file)
    return tensors, file_of


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
