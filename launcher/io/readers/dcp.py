"""Reads a model that torch's distributed checkpoint (DCP) saved, without executing its pickles.

`.metadata` is a pickle of plain dataclasses (torch.distributed.checkpoint.metadata). Each chunk in
a `.distcp` file is a `torch.save` archive at [offset, offset + length), with an uncompressed tensor
(torch.distributed.checkpoint.filesystem).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any

import torch

from launcher.errors import UserError
from launcher.folders.brief import brief
from launcher.folders.kind import ACCELERATE, UNREADABLE
from launcher.io.readers.found import FoundModel
from launcher.io.readers.nesting import find_model
from launcher.io.readers.torch_file import read_file, unpickle
from launcher.io.readers.unpickle import Inert, is_shape, is_size
from launcher.io.readers.wrapper_prefixes import NOT_WEIGHTS, skipped_note, stripped_names
from launcher.io.tensor import Tensor
from launcher.io.tensor.stored import Piece, Stored, box_pieces


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the archive that contains it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    begin: int  # byte offset in the file
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor of a save, in chunks. Replicas of a box have the same values: it has one of them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def read_chunk(self, chunk: Chunk, name: str) -> Stored:
        """The values of a chunk. Raises UserError if the archive is damaged or another tensor."""
        part = read_file(chunk.file, chunk.begin, chunk.length)
        if not isinstance(part, Stored) or (part.dtype, part.shape) != (self.dtype, chunk.sizes):
            raise UserError(
                f"{chunk.file}: the part of {name} at {list(chunk.offsets)} is not the "
                f"{self.dtype} of {list(chunk.sizes)} that .metadata lists"
            )
        return part


@dataclass(frozen=True)
class Index:
    """What `.metadata` lists, checked. The files of the chunks were not looked at."""

    file: Path
    tensors: dict[str, Entry]
    paths: dict[str, tuple[str, ...]]  # of all entries: the keys of the nested dicts


def read_model(folder: Path, key: str | None = None) -> FoundModel:
    """The model's tensors: the entries under `model`, or all entries if the save is not nested.

    `key`: under which key the model is, if the save contains several (`nesting.find_model`). Raises
    UserError if the save is incomplete, or of a kind that cannot be read.
    """
    index = read_index(_dcp_folder(folder))
    names, notes = _names(index, key)
    tensors: dict[str, Tensor] = {}
    for key, name in names.items():
        tensors[name] = _stored(name, index, index.tensors[key])
    return FoundModel(tensors, notes=notes)


def _dcp_folder(folder: Path) -> Path:
    if (folder / ".metadata").is_file():
        return folder
    inner = [path for path in folder.glob(ACCELERATE) if (path / ".metadata").is_file()]
    if len(inner) == 1:
        return inner[0]
    if inner:
        raise UserError(f"{folder} contains {len(inner)} models; name one of {ACCELERATE}")
    for path in sorted(folder.rglob("*")):
        for pattern, description in UNREADABLE.items():
            if re.fullmatch(pattern, path.name):
                raise UserError(f"{path} is {description}")
    raise UserError(f"{folder / '.metadata'} is missing: the save did not finish")


def _names(index: Index, key: str | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """(key → name in the model for its tensors, notes on entries that were left out)."""
    file = index.file
    names, notes = find_model(index.paths, index.tensors.keys(), file, key)
    not_tensors = names.keys() - index.tensors.keys()
    names = {key: name for key, name in names.items() if key not in not_tensors}
    weights = stripped_names([*names.values()], file)
    not_weights = {key for key, name in names.items() if name not in weights}
    names = {key: weights[name] for key, name in names.items() if name in weights}
    if flattened := [name for name in names.values() if "_flat_param" in name]:
        raise UserError(
            f"{file} contains {flattened[0]}: a flattened parameter of FSDP1 (LOCAL_STATE_DICT), "
            "which cannot be split into its tensors; save with SHARDED_STATE_DICT"
        )
    if not names:
        top_level = sorted({path[0] for path in index.paths.values()})[:5]
        raise UserError(
            f"{file} contains no model, but {', '.join(top_level) or 'nothing'} → the folder with "
            "the weights of this step"
        )
    return names, (*notes, *skipped_note(not_tensors | not_weights, NOT_WEIGHTS))


def read_index(folder: Path) -> Index:
    """The tensors that `.metadata` of the folder lists. Raises UserError if it is damaged."""
    file = folder / ".metadata"
    metadata = unpickle(file)
    try:
        states = _attribute(metadata, "state_dict_metadata", _is_dict)
        stored = _attribute(metadata, "storage_data", dict)
        planner = _attribute(metadata, "planner_data", dict | None) or {}
        entries = {key: _entry(state) for key, state in states.items() if _has_chunks(state)}
        chunks = _chunks(folder, entries, stored)
    except _Wrong as error:
        raise UserError(f"{file} is not DCP metadata: {error}") from error
    paths = {key: _path(planner, key) for key in states}
    tensors = {
        key: Entry(dtype, shape, tuple(chunks[key].values()))
        for key, (dtype, shape, _) in entries.items()
    }
    return Index(file, tensors, paths)


class _Wrong(Exception):
    """What in a pickle is not as it should be."""


_Boxes = dict[tuple[int, ...], tuple[int, ...]]  # offsets → sizes
_Listed = tuple[torch.dtype, tuple[int, ...], _Boxes]  # dtype and shape of a tensor, and its boxes


def _attribute(value: Any, name: str, kind: Any) -> Any:
    """An attribute of an inert object. `kind`: its type, or a function that accepts it."""
    found = _optional(value, name)
    is_type = isinstance(kind, type | UnionType)
    if not (isinstance(found, kind) if is_type else kind(found)):
        raise _Wrong(f"{name} is {brief(found)}")
    return found


def _optional(value: Any, name: str) -> Any:
    return vars(value).get(name) if isinstance(value, Inert) else None


def _is_dict(value: Any) -> bool:
    """Whether it is a dict by names."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _has_chunks(state: Any) -> bool:
    return isinstance(state, Inert) and "chunks" in vars(state)


def _path(planner: dict[Any, Any], key: str) -> tuple[str, ...]:
    path = planner.get(key, (key,))
    is_path = isinstance(path, tuple | list) and all(isinstance(part, str | int) for part in path)
    return tuple(map(str, path)) if is_path and path else (key,)


def _entry(state: Any) -> _Listed:
    """The dtype is the first item of the pickled state of the entry's properties."""
    properties = _attribute(_attribute(state, "properties", Inert), "state", tuple)
    if not properties or not isinstance(properties[0], torch.dtype):
        raise _Wrong(f"a dtype is {brief(properties)}")
    shape = tuple(_attribute(state, "size", is_shape))
    boxes = {}
    for chunk in _attribute(state, "chunks", list):
        offsets = tuple(_attribute(chunk, "offsets", is_shape))
        sizes = tuple(_attribute(chunk, "sizes", is_shape))
        if not len(offsets) == len(sizes) == len(shape) or any(
            offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise _Wrong(f"a part of {list(sizes)} at {list(offsets)} of {list(shape)}")
        boxes[offsets] = sizes
    return properties[0], shape, boxes


def _chunks(
    folder: Path, entries: dict[str, _Listed], stored: dict[Any, Any]
) -> dict[str, dict[tuple[int, ...], Chunk]]:
    """Key → offsets → chunk."""
    chunks: dict[str, dict[tuple[int, ...], Chunk]] = {key: {} for key in entries}
    for index, place in stored.items():
        key = _attribute(index, "fqn", str)
        if key not in entries:
            continue
        _, shape, boxes = entries[key]
        found = _attribute(index, "offset", lambda offset: offset is None or is_shape(offset))
        offsets = (0,) * len(shape) if found is None else tuple(found)
        if offsets not in boxes:
            raise _Wrong(f"it has no part of {key} at {list(offsets)}")
        if extensions := _optional(place, "transform_descriptors"):
            raise UserError(
                f"{folder / '.metadata'} lists {key} as compressed ({brief(extensions)}); save it "
                "without extensions"
            )
        file = folder / _relative_path(folder, _attribute(place, "relative_path", str))
        begin, length = (_attribute(place, name, is_size) for name in ("offset", "length"))
        chunks[key].setdefault(offsets, Chunk(offsets, boxes[offsets], file, begin, length))
    return chunks


def _relative_path(folder: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if "\0" in name or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{folder / '.metadata'} lists {name}, which lies outside the folder")
    return path


def _stored(name: str, index: Index, entry: Entry) -> Tensor:
    pieces: list[Piece] = []
    for chunk in entry.chunks:
        if not chunk.file.is_file():
            raise UserError(f"{chunk.file} is missing; {index.file} lists it")
        part = entry.read_chunk(chunk, name)
        if part.pieces:
            begin, width = part.pieces[0].begin, entry.dtype.itemsize
            pieces += box_pieces(chunk.file, begin, chunk.offsets, chunk.sizes, entry.shape, width)
    return Stored(name, entry.dtype, entry.shape, tuple(pieces))
