"""A model saved by torch's distributed checkpoint (DCP), read without executing its pickles.

`.metadata` is a pickle of plain dataclasses (torch.distributed.checkpoint.metadata). Each chunk in
a `.distcp` file is a `torch.save` archive of its own at [offset, offset + length)
(torch.distributed.checkpoint.filesystem), its tensor uncompressed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.readers.found import Found
from launcher.export.readers.prefixes import clean, cleaned, dropped
from launcher.export.readers.torch_file import read_file, unpickle
from launcher.export.tensor import Tensor
from launcher.export.tensor.stored import Piece, Stored, box_pieces

KIND = "PyTorch distributed checkpoint (DCP)"
ACCELERATE = "pytorch_model_fsdp_*"  # accelerate's folder of a model's DCP files
UNREADABLE = {
    r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin": (
        "one file a rank of accelerate (LOCAL_ or SHARDED_STATE_DICT without DCP), from which "
        "shapes cannot be told; save with fsdp_state_dict_type: SHARDED_STATE_DICT"
    ),
    r"model_world_size_\d+_rank_\d+\.pt": (
        "one file a rank of verl; merge them with verl's own model merger"
    ),
    r"__\d+\.metadata": (
        "metadata of single ranks (saved without collectives); save with use_collectives=True"
    ),
}


@dataclass(frozen=True)
class Box:
    """A region of a tensor and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    begin: int
    length: int


def recognises(folder: Path) -> bool:
    """Whether `folder`, or accelerate's folder in it, is a DCP save, whole or not."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return (
        any(name == ".metadata" or name.endswith(".distcp") for name in names)
        or any(path.is_dir() and recognises(path) for path in folder.glob(ACCELERATE))
        or any(re.fullmatch(pattern, name) for pattern in UNREADABLE for name in names)
    )


def read_model(folder: Path) -> Found:
    """The model's tensors: the entries under `model`, or all when the save is not nested.

    Raises UserError when the save is not whole, or is of a kind that cannot be read.
    """
    folder = _dcp_folder(folder)
    file = folder / ".metadata"
    metadata = unpickle(file)
    try:
        names, notes = _names(file, metadata)
        entries = {key: _entry(metadata.state_dict_metadata[key]) for key in names}
        boxes = _boxes(folder, metadata, names)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no DCP metadata: it lacks {error}") from error
    tensors: dict[str, Tensor] = {}
    short = cleaned(names.values(), file)
    for key, (dtype, shape) in entries.items():
        name = short[names[key]]
        tensors[name] = _stored(name, dtype, shape, boxes[key])
    return Found(tensors, notes=notes)


def _dcp_folder(folder: Path) -> Path:
    if (folder / ".metadata").is_file():
        return folder
    inside = [path for path in folder.glob(ACCELERATE) if (path / ".metadata").is_file()]
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise UserError(f"{folder} holds {len(inside)} models; name one of {ACCELERATE}")
    for path in sorted(folder.rglob("*")):
        for pattern, what in UNREADABLE.items():
            if re.fullmatch(pattern, path.name):
                raise UserError(f"{path} is {what}")
    raise UserError(f"{folder / '.metadata'} is missing: the save did not finish")


def _names(file: Path, metadata: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """Key → name in the model of the tensors that belong to it, and notes on what is left out."""
    listed: dict[str, Any] = metadata.state_dict_metadata
    paths = metadata.planner_data or {}
    path_of = {key: tuple(map(str, paths.get(key, (key,)))) for key in listed}
    names = {key: path[0] for key, path in path_of.items() if len(path) == 1}
    for at in (1, 0):  # {"app": {"model": …}}, but rather {"model": …}
        under = {
            key: ".".join(path[at + 1 :])
            for key, path in path_of.items()
            if len(path) > at + 1 and path[at] == "model" and not path[0].startswith("optim")
        }
        names = under or names
    no_tensors = {key for key in names if not hasattr(listed[key], "chunks")}
    names = {key: name for key, name in names.items() if key not in no_tensors}
    no_weights = {key for key, name in names.items() if clean(name) is None}
    names = {key: name for key, name in names.items() if key not in no_weights}
    if flat := [name for name in names.values() if "_flat_param" in name]:
        raise UserError(
            f"{file} holds {flat[0]}: a flattened parameter of FSDP1 (LOCAL_STATE_DICT), whose "
            "parts cannot be told apart; save with SHARDED_STATE_DICT"
        )
    if not names:
        first = sorted({path[0] for path in path_of.values()})[:5]
        raise UserError(f"{file} holds no model, but {', '.join(first) or 'nothing'}")
    return names, dropped(no_tensors | no_weights, "that are no weights")


def _entry(entry: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """(dtype, shape). The properties' pickled state begins with the dtype."""
    return entry.properties.state[0], tuple(entry.size)


def _boxes(folder: Path, metadata: Any, names: dict[str, str]) -> dict[str, list[Box]]:
    """Key → its regions, each once: replicas of one region are the same values."""
    found: dict[str, dict[Any, Box]] = {key: {} for key in names}
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key in names
        for chunk in metadata.state_dict_metadata[key].chunks
    }
    for index, stored in metadata.storage_data.items():
        if index.fqn not in names:
            continue
        file = folder / _within(folder, stored.relative_path)
        if getattr(stored, "transform_descriptors", None):
            raise UserError(
                f"{file} holds {index.fqn} compressed ({', '.join(stored.transform_descriptors)}); "
                "save it without extensions"
            )
        dims = len(metadata.state_dict_metadata[index.fqn].size)
        offsets = (0,) * dims if index.offset is None else tuple(index.offset)
        size = sizes[index.fqn, offsets]
        box = Box(offsets, size, file, int(stored.offset), int(stored.length))
        found[index.fqn].setdefault(offsets, box)
    for file in sorted({box.file for boxes in found.values() for box in boxes.values()}):
        if not file.is_file():
            raise UserError(f"{file} is missing; {folder / '.metadata'} lists it")
    return {key: list(boxes.values()) for key, boxes in found.items()}


def _within(folder: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{folder / '.metadata'} lists {name}, which is outside the folder")
    return path


def _stored(name: str, dtype: torch.dtype, shape: tuple[int, ...], boxes: list[Box]) -> Tensor:
    pieces: list[Piece] = []
    for box in boxes:
        chunk = read_file(box.file, box.begin, box.length)
        if not isinstance(chunk, Stored) or (chunk.dtype, chunk.shape) != (dtype, box.sizes):
            raise UserError(
                f"{box.file}: the part of {name} at {list(box.offsets)} is not the {dtype} of "
                f"{list(box.sizes)} that .metadata says"
            )
        if chunk.pieces:
            begin = chunk.pieces[0].begin
            pieces += box_pieces(box.file, begin, box.offsets, box.sizes, shape, dtype.itemsize)
    return Stored(name, dtype, shape, tuple(pieces))
