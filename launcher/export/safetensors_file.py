"""The safetensors format, read and written a range of bytes at a time.

8 bytes little-endian header length, a JSON header padded with spaces, the data without holes
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError

ALIGNMENT = 4096  # of the data: page-aligned for mmap and direct I/O
LONGEST_HEADER = 100_000_000  # the format's own limit, bytes

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
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
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int  # of its bytes in the file
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return nbytes(self.dtype, self.shape[1:])

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last); a tensor without dimensions has one row, itself."""
        data = bytearray((last - first) * self.row_bytes)
        with self.file.open("rb") as file:
            file.seek(self.begin + first * self.row_bytes)
            if file.readinto(data) != len(data):
                raise UserError(f"{self.file} ends inside tensor {self.name}: it was cut short")
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        if not data:
            return torch.empty(shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name → tensor of one safetensors file. Raises UserError when the file is damaged."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(LONGEST_HEADER, size):
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                name,
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                file,
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no safetensors file: {error}") from error
    _check_tiling(file, list(tensors.values()), 8 + length, size)
    return tensors


def header(tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The length and header of a file that holds `tensors` in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + nbytes(dtype, shape)
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", padded) + text.ljust(padded)


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def readable(path: Path) -> None:
    """Give `path` the mode that the umask asks for, whatever made it."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _check_tiling(file: Path, tensors: list[StoredTensor], data: int, size: int) -> None:
    """Tensors must cover the data without gap or overlap, each with the bytes its shape needs."""
    at = data
    for tensor in sorted(tensors, key=lambda each: (each.begin, each.nbytes)):
        if tensor.nbytes != nbytes(tensor.dtype, tensor.shape):
            raise UserError(f"{file}: {tensor.name} has {tensor.nbytes} bytes for {tensor.shape}")
        if tensor.begin != at:
            raise UserError(f"{file}: {tensor.name} begins at byte {tensor.begin}, expected {at}")
        at += tensor.nbytes
    if at != size:
        raise UserError(f"{file} has {size} bytes, its header describes {at}: it was cut or grew")
