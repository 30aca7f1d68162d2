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
from launcher.folders.tensor_entries import TensorEntry, file_entries
from launcher.io.tensor import Tensor
from launcher.io.tensor.stored import Stored, run_pieces

ALIGNMENT = 4096  # of the data: page-aligned for mmap and direct I/O

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
    "F8_E8M0": torch.float8_e8m0fnu,
}
# They are copied; nothing is computed with them.
COPIED_DTYPES: dict[str, torch.dtype] = {
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in (DTYPES | COPIED_DTYPES).items()}


def read_header(file: Path) -> dict[str, Tensor]:
    """Name → tensor of one safetensors file. Raises UserError if the file is damaged."""
    return {name: _stored(name, entry) for name, entry in file_entries(file).items()}


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Name → values of one safetensors file. Raises UserError if the file is damaged."""
    return {name: tensor.read_all() for name, tensor in read_header(file).items()}


def data_ranges(file: Path) -> dict[str, tuple[int, int]]:
    """Name → the bytes [begin, end) of the file that contain the tensor."""
    return {name: (entry.begin, entry.end) for name, entry in file_entries(file).items()}


def header(tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header, with its length, of a file with `tensors` in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        sizes = [*shape[:-1], shape[-1] * 2] if dtype == torch.float4_e2m1fn_x2 else list(shape)
        table[name] = {"dtype": CODES[dtype], "shape": sizes, "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", padded) + text.ljust(padded)


def apply_umask(path: Path) -> None:
    """Give `path` the permissions of a newly created file or folder."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _stored(name: str, entry: TensorEntry) -> Tensor:
    known, shape = DTYPES | COPIED_DTYPES, entry.shape
    if entry.dtype not in known:
        raise UserError(
            f"{entry.file}: {name} is of {entry.dtype:.80}, which is not one of {', '.join(known)}"
        )
    dtype = known[entry.dtype]
    if dtype == torch.float4_e2m1fn_x2:  # torch has two values in an element
        if not shape or shape[-1] % 2:
            raise UserError(f"{entry.file}: {name} of F4 has the shape {list(shape)}, an odd size")
        shape = (*shape[:-1], shape[-1] // 2)
    pieces = run_pieces(entry.file, entry.begin, 0, math.prod(shape), shape, dtype.itemsize)
    return Stored(name, dtype, shape, tuple(pieces))
