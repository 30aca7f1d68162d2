"""Reads and writes the headers of safetensors files.

A file consists of the header length (8 bytes, little-endian), a JSON header padded with spaces, and
the data without gaps (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.io.tensor import Tensor
from launcher.io.tensor.stored import Piece, Stored, run_pieces

ALIGNMENT = 4096  # of the data: page-aligned for mmap and direct I/O
MAX_HEADER_BYTES = 100_000_000  # the limit of the format

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Entry = tuple[torch.dtype, tuple[int, ...], int, int]  # dtype, shape, [begin, end) in the data
CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_header(file: Path) -> dict[str, Tensor]:
    """Name → tensor of one safetensors file. Raises UserError if the file is damaged."""
    data, entries = _entries(file)
    return {
        name: Stored(name, dtype, shape, _pieces(file, data + begin, shape, dtype))
        for name, (dtype, shape, begin, _) in entries.items()
    }


def data_ranges(file: Path) -> dict[str, tuple[int, int]]:
    """Name → the bytes [begin, end) of the file that contain the tensor."""
    data, entries = _entries(file)
    return {name: (data + begin, data + end) for name, (*_, begin, end) in entries.items()}


def header(tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header, with its length, of a file with `tensors` in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", padded) + text.ljust(padded)


def apply_umask(path: Path) -> None:
    """Give `path` the permissions of a newly created file or folder."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _entries(file: Path) -> tuple[int, dict[str, Entry]]:
    """(offset of the data in the file, name → entry of the header)."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER_BYTES, size):
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries: dict[str, Entry] = {
            name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a safetensors file: {error}") from error
    _check_tiling(file, entries, 8 + length, size)
    return 8 + length, entries


def _pieces(file: Path, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Piece, ...]:
    return tuple(run_pieces(file, at, 0, math.prod(shape), shape, dtype.itemsize))


def _check_tiling(file: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    """Tensors must cover the data without gap or overlap, each with the bytes its shape needs."""
    at = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{file}: {name} has {end - begin} bytes for {shape}")
        if begin != at:
            raise UserError(f"{file}: {name} begins at byte {begin} of the data, expected {at}")
        at = end
    if data + at != size:
        raise UserError(
            f"{file} has {size} bytes, its header describes {data + at}: it was truncated or "
            "extended"
        )
