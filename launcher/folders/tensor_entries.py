"""Where the tensors of a model folder are, from the headers of its safetensors files. Imports no
torch.

A file consists of the header length (8 bytes, little-endian), a JSON header, and the data
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launcher.folders.json_file import read_object_or_empty

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 2**24  # of each tensor, in memory while two are compared


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a safetensors file."""

    file: Path
    dtype: str  # in the format's spelling, such as BF16
    shape: tuple[int, ...]
    begin: int  # the bytes [begin, end) of the file
    end: int


def file_entries(file: Path) -> dict[str, TensorEntry]:
    """Name → tensor of one file. Raises OSError, ValueError, KeyError or TypeError if it cannot be
    read."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    data = 8 + size
    return {
        name: TensorEntry(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            *(data + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
    }


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
    weight_map = read_object_or_empty(folder / INDEX).get("weight_map")
    try:
        if isinstance(weight_map, dict):
            files = [folder / str(name) for name in sorted(set(weight_map.values()))]
        else:
            files = sorted(folder.glob("*.safetensors"))
        return {name: entry for file in files for name, entry in file_entries(file).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
