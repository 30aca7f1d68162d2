"""Reads sharded safetensors that torch's `HuggingFaceStorageWriter(save_distributed=True)` wrote.

Files are `shard-{rank}-model-{file}-of-{files}.safetensors`, numbered from 1. The entry
`__metadata__.DCP_SHARDING_INFO` of each header gives the offsets of the file's tensors in the full
tensors (torch.distributed.checkpoint._hf_utils). Neither the full shapes nor the number of ranks is
saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import UserError
from launcher.folders import tensor_entries
from launcher.folders.brief import brief
from launcher.folders.kind import DCP_SUBFOLDER, dcp_shards
from launcher.io.readers.found import FoundModel
from launcher.io.readers.nesting import model_tensors
from launcher.io.readers.safetensors_file import read_header
from launcher.io.readers.unpickle import is_shape
from launcher.io.readers.wrapper_prefixes import with_stripped_names
from launcher.io.tensor import Tensor
from launcher.io.tensor.stored import Piece, Stored, box_pieces

Shapes = Mapping[str, tuple[int, ...]]
Parts = dict[tuple[int, ...], Stored]  # by their offsets


def read_model(folder: Path, shapes: Shapes | None = None, key: str | None = None) -> FoundModel:
    """The full tensors, from the files of all ranks.

    `shapes`: the full shapes by name, if they are known. Without them it cannot be detected that
    the files of the last ranks are missing; a note reports this. `key`: of the model, if the names
    begin with those of several (`nesting.find_model`). Raises UserError if a shard is
    missing or damaged.
    """
    folder = folder if dcp_shards(folder) else folder / DCP_SUBFOLDER
    files = dcp_shards(folder)
    ranks = {int(match[1]) for match in files.values()}
    if missing := sorted(set(range(1, max(ranks) + 1)) - ranks):
        raise UserError(
            f"{folder} lacks the files shard-{missing[0]:05d}-model-…: a shard is missing"
        )
    parts: dict[str, Parts] = {}
    for file in files:
        offsets = _offsets(file)
        for name, part in read_header(file).items():
            if name not in offsets:
                raise UserError(f"{file} does not contain the offsets of its part of {name}")
            assert isinstance(part, Stored)
            parts.setdefault(name, {}).setdefault(offsets[name], part)
    full = {name: _full_tensor(folder, name, tensor_parts) for name, tensor_parts in parts.items()}
    model, other_models = model_tensors(full, folder, key)
    tensors, not_weights = with_stripped_names(model, folder)
    notes = (*other_models, *not_weights)
    if shapes is not None:
        _check_shapes(folder, tensors, shapes)
        return FoundModel(tensors, notes=notes)
    note = (
        f"{folder} has files of {len(ranks)} rank(s); the format does not show whether these are "
        "all ranks"
    )
    return FoundModel(tensors, notes=(*notes, note))


def _offsets(file: Path) -> dict[str, tuple[int, ...]]:
    """Name → offsets of the file's part in the full tensor."""
    try:
        info = json.loads(tensor_entries.read_header(file).metadata["DCP_SHARDING_INFO"])
        offsets = {name: entry["saved_offsets"] for name, entry in info.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} has no readable DCP_SHARDING_INFO: {error!r:.200}") from error
    if wrong := [name for name, values in offsets.items() if not is_shape(values)]:
        raise UserError(
            f"{file} has no readable DCP_SHARDING_INFO: {wrong[0]} is at {brief(offsets[wrong[0]])}"
        )
    return {name: tuple(values) for name, values in offsets.items()}


def _full_tensor(folder: Path, name: str, parts: Parts) -> Tensor:
    """The tensor that ends where the last of its parts end. Raises UserError if there is a gap."""
    any_part = next(iter(parts.values()))
    types = {(part.dtype, len(part.shape)) for part in parts.values()}
    if len(types) > 1 or any(len(offsets) != len(any_part.shape) for offsets in parts):
        raise UserError(f"{folder}: the parts of {name} differ in dtype or dims")
    shape = tuple(
        max(offsets[dim] + part.shape[dim] for offsets, part in parts.items())
        for dim in range(len(any_part.shape))
    )
    pieces: list[Piece] = []
    for offsets, part in parts.items():
        if part.pieces:
            file, begin = part.pieces[0].file, part.pieces[0].begin
            width = any_part.dtype.itemsize
            pieces += box_pieces(file, begin, offsets, part.shape, shape, width)
    try:
        return Stored(name, any_part.dtype, shape, tuple(pieces))
    except UserError as error:
        raise UserError(f"{folder}: a shard is missing or of another save; {error}") from error


def _check_shapes(folder: Path, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != tuple(shape):
            raise UserError(
                f"{folder}: {name} has the shape {list(tensors[name].shape)}, the model's is "
                f"{list(shape)}: a shard is missing"
            )
