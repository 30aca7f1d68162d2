"""Sharded safetensors as torch's `HuggingFaceStorageWriter(save_distributed=True)` writes them.

`shard-{rank}-model-{file}-of-{files}.safetensors`, numbered from 1; each header's
`__metadata__.DCP_SHARDING_INFO` gives the offsets of the file's tensors in the whole ones
(torch.distributed.checkpoint._hf_utils). Neither the whole shapes nor the number of ranks is saved.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import UserError
from launcher.export.readers.found import Found
from launcher.export.readers.prefixes import with_clean_names
from launcher.export.readers.safetensors_file import read_header
from launcher.export.tensor import Tensor
from launcher.export.tensor.stored import Piece, Stored, box_pieces

KIND = "sharded safetensors of PyTorch's distributed checkpoint"
NAME = re.compile(r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors")
SUBFOLDER = "sharded"  # of the writer with enable_consolidation
Shapes = Mapping[str, tuple[int, ...]]
Parts = dict[tuple[int, ...], Stored]  # by their offsets


def recognises(folder: Path) -> bool:
    return bool(_files(folder) or _files(folder / SUBFOLDER))


def read_model(folder: Path, shapes: Shapes | None = None) -> Found:
    """The tensors put together from all ranks' files.

    `shapes`: of the whole tensors where they are known (by their names here); without them the
    loss of the last ranks' files cannot be seen, which a note says. Raises UserError when a shard
    is missing or damaged.
    """
    folder = folder if _files(folder) else folder / SUBFOLDER
    files = _files(folder)
    ranks = {int(match[1]) for match in files.values()}
    if lost := sorted(set(range(1, max(ranks) + 1)) - ranks):
        raise UserError(f"{folder} lacks the files shard-{lost[0]:05d}-model-…: a shard is missing")
    parts: dict[str, Parts] = {}
    for file in files:
        offsets = _offsets(file)
        for name, part in read_header(file).items():
            if name not in offsets:
                raise UserError(f"{file} does not say where its part of {name} belongs")
            assert isinstance(part, Stored)
            parts.setdefault(name, {}).setdefault(offsets[name], part)
    tensors = {name: _whole(folder, name, each) for name, each in parts.items()}
    found = with_clean_names(tensors, folder)
    if shapes is not None:
        _check(folder, found, shapes)
        return Found(found)
    note = f"{folder} has files of {len(ranks)} rank(s), and does not say whether that is all"
    return Found(found, notes=(note,))


def _files(folder: Path) -> dict[Path, re.Match[str]]:
    names = {path: NAME.fullmatch(path.name) for path in sorted(folder.glob("shard-*.safetensors"))}
    return {path: match for path, match in names.items() if match}


def _offsets(file: Path) -> dict[str, tuple[int, ...]]:
    """Name → where the file's part of that tensor begins."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            content = json.loads(stream.read(min(length, file.stat().st_size)))
        info = json.loads(content["__metadata__"]["DCP_SHARDING_INFO"])
        return {name: tuple(map(int, entry["saved_offsets"])) for name, entry in info.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not say how it was sharded: {error!r}") from error


def _whole(folder: Path, name: str, parts: Parts) -> Tensor:
    """The tensor whose corner is the furthest corner of its parts. UserError on a gap."""
    one = next(iter(parts.values()))
    kinds = {(part.dtype, len(part.shape)) for part in parts.values()}
    if len(kinds) > 1 or any(len(offsets) != len(one.shape) for offsets in parts):
        raise UserError(f"{folder}: the parts of {name} differ in dtype or dims")
    shape = tuple(
        max(offsets[dim] + part.shape[dim] for offsets, part in parts.items())
        for dim in range(len(one.shape))
    )
    pieces: list[Piece] = []
    for offsets, part in parts.items():
        if part.pieces:
            file, begin = part.pieces[0].file, part.pieces[0].begin
            pieces += box_pieces(file, begin, offsets, part.shape, shape, one.dtype.itemsize)
    try:
        return Stored(name, one.dtype, shape, tuple(pieces))
    except UserError as error:
        raise UserError(f"{folder}: a shard is missing or of another save; {error}") from error


def _check(folder: Path, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != tuple(shape):
            raise UserError(
                f"{folder}: {name} comes out as {list(tensors[name].shape)}, the model's is "
                f"{list(shape)}: a shard is missing"
            )
