"""Where the tensors of a model folder are, from the headers of its safetensors files. Imports no
torch.

A file consists of the header length (8 bytes, little-endian), a JSON header, and the data
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.errors import UserError
from launcher.folders import regular
from launcher.folders.brief import brief
from launcher.folders.json_file import is_text, read_object, read_object_or_empty
from launcher.folders.unreadable import reason_unreadable

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 2**24  # of each tensor, in memory while two are compared
MAX_HEADER_BYTES = 100_000_000  # the limit of the format
MAX_OBJECTS = 200_000  # in a header: tensors, and their offsets in its metadata
MAX_NAME = 255  # bytes of a file name that file systems accept
MAX_SIZE = 1 << 48  # of a tensor or a dim of one, in elements
WIDTHS = {  # dtype in the format's spelling → bytes of an element
    "BOOL": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "F4": 0.5, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a safetensors file."""

    file: Path
    dtype: str  # in the format's spelling, such as BF16
    shape: tuple[int, ...]
    begin: int  # the bytes [begin, end) of the file
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def file_entries(file: Path) -> dict[str, TensorEntry]:
    """Name → tensor of one file. Raises UserError if the file is damaged."""
    return read_header(file).entries


def read_header(file: Path) -> Header:
    """The header of a file. Raises UserError if the file is damaged: tensors must cover the data
    without gap or overlap, each with the bytes that its shape needs."""
    try:
        size = file.stat().st_size
        with regular.open_file(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes")
            text = stream.read(length)
        if (objects := text.count(b"{")) > MAX_OBJECTS:
            raise ValueError(f"its header lists {objects:,} tensors, more than {MAX_OBJECTS:,}")
        table = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(table, dict):
            raise ValueError(f"its header is a {type(table).__name__}")
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(map(is_text, metadata.values())):
            raise ValueError("its __metadata__ is not a table of texts")
        entries = {name: _entry(file, 8 + length, name, entry) for name, entry in table.items()}
    except (OSError, ValueError, RecursionError) as error:
        reason = reason_unreadable(file, error) or f"is not a safetensors file: {error!s:.200}"
        raise UserError(f"{file} {reason}") from error
    _check_tiling(file, entries, 8 + length, size)
    return Header(entries, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"its header has {twice} twice")
    return table


def _entry(file: Path, data: int, name: str, entry: Any) -> TensorEntry:
    """`data`: where the data begins. Raises ValueError."""
    values = entry if isinstance(entry, dict) else {}
    dtype: Any = values.get("dtype")
    shape: Any = values.get("shape")
    offsets: Any = values.get("data_offsets")
    if not is_text(dtype):
        raise ValueError(f"{name} has the dtype {brief(dtype)}")
    if not _are_sizes(shape):
        raise ValueError(f"{name} has the shape {brief(shape)}")
    if not (_are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise ValueError(f"{name} has the data_offsets {brief(offsets)}")
    return TensorEntry(file, dtype, tuple(shape), *(data + offset for offset in offsets))


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < MAX_SIZE for value in values)
        and math.prod(value for value in values if value) < MAX_SIZE**2
    )


def _check_tiling(file: Path, entries: dict[str, TensorEntry], data: int, size: int) -> None:
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        nbytes = entry.end - entry.begin
        if entry.dtype in WIDTHS and nbytes != math.prod(entry.shape) * WIDTHS[entry.dtype]:
            raise UserError(f"{file}: {name} has {nbytes} bytes for {entry.shape}")
        if entry.begin != at:
            raise UserError(
                f"{file}: {name} begins at byte {entry.begin - data} of the data, expected "
                f"{at - data}"
            )
        at = entry.end
    if at != size:
        raise UserError(
            f"{file} has {size} bytes, its header describes {at}: it was truncated or extended"
        )


def read_weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor → name of its file, from an index of weights. Raises UserError if it is
    damaged, or names a file outside its folder."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is not an index of weights: it lists no tensors")
    for name, file in weight_map.items():
        if not is_text(file) or not file or "\0" in file or len(os.fsencode(file)) > MAX_NAME:
            raise UserError(f"{index} lists {name} in {brief(file)}, which is not a file name")
    for file in sorted(set(weight_map.values())):
        if not is_inside(file):
            raise UserError(f"{index} lists {file}, which lies outside the folder")
    return weight_map


def check_index(
    index: Path, file_of: Mapping[str, str], names: Mapping[str, Collection[str]]
) -> None:
    """Raises UserError unless the files have the tensors that `index` lists there, each once and no
    other, and are all that libraries would read.

    Args:
        file_of: Name of a tensor → name of its file, as the index lists it.
        names: Name of each file that the index lists → the names of its tensors.
    """
    folder, whole = index.parent, index.name.removesuffix(".index.json")
    if whole not in names and (folder / whole).is_file():
        raise UserError(
            f"{folder} contains {whole} and {index.name}, which lists other files: transformers "
            f"would read the one and vLLM the other → {folder} without one of them"
        )
    found: dict[str, str] = {}
    for file, tensors in names.items():
        for name in tensors:
            if name in found:
                raise UserError(
                    f"{name} is in both {found[name]} and {file} of {folder}: it is unclear which "
                    "of them is the model's → the same download or copy once more"
                )
            found[name] = file
    if missing := sorted(name for name, file in file_of.items() if found.get(name) != file):
        raise UserError(
            f"{index} lists {missing[0]} ({len(missing)} such tensors) in {file_of[missing[0]]}, "
            "which does not contain it: the index is stale → the one that belongs to the files"
        )
    if extra := sorted(found.keys() - file_of.keys()):
        raise UserError(
            f"{folder / found[extra[0]]} contains {extra[0]} ({len(extra)} such tensors), which "
            f"{index.name} does not list: the index is stale → the one that belongs to the files"
        )


def is_inside(name: str) -> bool:
    """Whether a relative path stays in the folder it starts from, links aside."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def tensor_names(folder: Path) -> set[str]:
    """The names of a folder's tensors, from the index or from the headers of the files.

    Empty if they cannot be read: the loader then reports the reason.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_object_or_empty(index).get("weight_map")
        return set(weight_map) if isinstance(weight_map, dict) else set()
    return set(tensor_entries(folder))


def tensor_entries(folder: Path) -> dict[str, TensorEntry]:
    """Name → tensor of a folder; empty if a file cannot be read: the loader reports that."""
    index = folder / INDEX
    try:
        files: Sequence[Path] = sorted(folder.glob("*.safetensors"))
        if index.is_file():
            files = [folder / name for name in sorted({*read_weight_map(index).values()})]
        return {name: entry for file in files for name, entry in file_entries(file).items()}
    except UserError:
        return {}


def same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of the same dtype and shape have the same bytes. Stops at the first
    difference."""
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.end - one.begin
        while left:
            count = min(left, CHUNK_BYTES)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True
