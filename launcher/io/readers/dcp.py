"""Reads a model that torch's distributed checkpoint (DCP) saved, without executing its pickles.

`.metadata` is a pickle of plain dataclasses (torch.distributed.checkpoint.metadata). Each chunk in
a `.distcp` file is a `torch.save` archive at [offset, offset + length), with an uncompressed tensor
(torch.distributed.checkpoint.filesystem).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from launcher.errors import UserError
from launcher.folders.kind import ACCELERATE, UNREADABLE
from launcher.io.readers.found import FoundModel
from launcher.io.readers.torch_file import read_file, unpickle
from launcher.io.readers.wrapper_prefixes import skipped_note, strip_wrappers, stripped_names
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


def read_model(folder: Path) -> FoundModel:
    """The model's tensors: the entries under `model`, or all entries if the save is not nested.

    Raises UserError if the save is incomplete, or of a kind that cannot be read.
    """
    folder = _dcp_folder(folder)
    file = folder / ".metadata"
    metadata = unpickle(file)
    try:
        names, notes = _names(file, metadata)
        entries = {key: _dtype_and_shape(metadata.state_dict_metadata[key]) for key in names}
        chunks = _chunks(folder, metadata, names)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not DCP metadata: it lacks {error}") from error
    tensors: dict[str, Tensor] = {}
    short = stripped_names(names.values(), file)
    for key, (dtype, shape) in entries.items():
        name = short[names[key]]
        tensors[name] = _stored(name, dtype, shape, chunks[key])
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


def _names(file: Path, metadata: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """(key → name in the model for its tensors, notes on entries that were left out)."""
    entries: dict[str, Any] = metadata.state_dict_metadata
    paths = metadata.planner_data or {}
    path_of = {key: tuple(map(str, paths.get(key, (key,)))) for key in entries}
    names = {key: path[0] for key, path in path_of.items() if len(path) == 1}
    for depth in (1, 0):  # {"app": {"model": …}}; {"model": …} takes precedence
        under_model = {
            key: ".".join(path[depth + 1 :])
            for key, path in path_of.items()
            if len(path) > depth + 1 and path[depth] == "model" and not path[0].startswith("optim")
        }
        names = under_model or names
    not_tensors = {key for key in names if not hasattr(entries[key], "chunks")}
    names = {key: name for key, name in names.items() if key not in not_tensors}
    not_weights = {key for key, name in names.items() if strip_wrappers(name) is None}
    names = {key: name for key, name in names.items() if key not in not_weights}
    if flattened := [name for name in names.values() if "_flat_param" in name]:
        raise UserError(
            f"{file} contains {flattened[0]}: a flattened parameter of FSDP1 (LOCAL_STATE_DICT), "
            "which cannot be split into its tensors; save with SHARDED_STATE_DICT"
        )
    if not names:
        top_level = sorted({path[0] for path in path_of.values()})[:5]
        raise UserError(f"{file} contains no model, but {', '.join(top_level) or 'nothing'}")
    return names, skipped_note(not_tensors | not_weights, "that are not weights")


def _dtype_and_shape(entry: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype is the first item of the pickled state of the entry's properties."""
    return entry.properties.state[0], tuple(entry.size)


def _chunks(folder: Path, metadata: Any, names: dict[str, str]) -> dict[str, list[Chunk]]:
    """Key → its chunks, each box once: replicas of a box have the same values."""
    chunks: dict[str, dict[tuple[int, ...], Chunk]] = {key: {} for key in names}
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key in names
        for chunk in metadata.state_dict_metadata[key].chunks
    }
    for index, stored in metadata.storage_data.items():
        if index.fqn not in names:
            continue
        file = folder / _relative_path(folder, stored.relative_path)
        if getattr(stored, "transform_descriptors", None):
            raise UserError(
                f"{file} contains {index.fqn} compressed "
                f"({', '.join(stored.transform_descriptors)}); save it without extensions"
            )
        dims = len(metadata.state_dict_metadata[index.fqn].size)
        offsets = (0,) * dims if index.offset is None else tuple(index.offset)
        size = sizes[index.fqn, offsets]
        chunk = Chunk(offsets, size, file, int(stored.offset), int(stored.length))
        chunks[index.fqn].setdefault(offsets, chunk)
    for file in sorted({chunk.file for boxes in chunks.values() for chunk in boxes.values()}):
        if not file.is_file():
            raise UserError(f"{file} is missing; {folder / '.metadata'} lists it")
    return {key: list(boxes.values()) for key, boxes in chunks.items()}


def _relative_path(folder: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{folder / '.metadata'} lists {name}, which lies outside the folder")
    return path


def _stored(name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: list[Chunk]) -> Tensor:
    pieces: list[Piece] = []
    for chunk in chunks:
        part = read_file(chunk.file, chunk.begin, chunk.length)
        if not isinstance(part, Stored) or (part.dtype, part.shape) != (dtype, chunk.sizes):
            raise UserError(
                f"{chunk.file}: the part of {name} at {list(chunk.offsets)} is not the {dtype} of "
                f"{list(chunk.sizes)} that .metadata lists"
            )
        if part.pieces:
            begin, width = part.pieces[0].begin, dtype.itemsize
            pieces += box_pieces(chunk.file, begin, chunk.offsets, chunk.sizes, shape, width)
    return Stored(name, dtype, shape, tuple(pieces))
