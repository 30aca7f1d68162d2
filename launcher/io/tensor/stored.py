"""A tensor that is stored in files, in one or several parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.io.boxes import boxes
from launcher.io.tensor.base import Tensor
from launcher.io.tensor.disk import read_buffered, read_into


@dataclass(frozen=True)
class Piece:
    """A rectangle of the matrix that is contiguous in a file, row after row."""

    file: Path
    begin: int  # byte offset in the file
    rows: tuple[int, int]  # [first, last)
    columns: tuple[int, int]  # [first, last)

    @property
    def size(self) -> int:
        """The number of elements."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class Stored(Tensor):
    """A tensor in one or several files.

    Raises UserError unless `pieces` cover the matrix exactly, without gap or overlap.
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        ordered = sorted(
            (piece for piece in self.pieces if piece.size), key=lambda p: (p.rows, p.columns)
        )
        object.__setattr__(self, "pieces", tuple(ordered))
        if not _cover_exactly(self.pieces, self.rows, self.columns):
            raise UserError(
                f"{self.name}: its {len(self.pieces)} part(s) do not tile the shape "
                f"{list(self.shape)}"
            )

    def read_into(self, out: torch.Tensor, first: int) -> None:
        last, width = first + len(out), self.dtype.itemsize
        for piece in self.pieces:
            top, bottom = max(first, piece.rows[0]), min(last, piece.rows[1])
            if piece.rows[0] >= last:
                break
            if top >= bottom:
                continue
            left, right = piece.columns
            begin = piece.begin + (top - piece.rows[0]) * (right - left) * width
            target = out[top - first : bottom - first, left:right]
            if target.is_contiguous():
                read_into(as_bytes(target), piece.file, begin, self.name)
            else:
                part = torch.empty(target.shape, dtype=self.dtype)
                read_into(as_bytes(part), piece.file, begin, self.name)
                target.copy_(part)

    def reference(self, first: int, last: int) -> torch.Tensor:
        out = torch.empty(last - first, self.columns, dtype=self.dtype)
        width = self.dtype.itemsize
        for row in range(first, last):
            for piece in self.pieces:
                if not piece.rows[0] <= row < piece.rows[1]:
                    continue
                left, right = piece.columns
                begin = piece.begin + (row - piece.rows[0]) * (right - left) * width
                data = read_buffered(piece.file, begin, (right - left) * width)
                out[row - first, left:right] = torch.frombuffer(data, dtype=self.dtype)
        if self.dtype == torch.float4_e2m1fn_x2:
            return out.view(torch.uint8)
        return out.double() if self.dtype.is_floating_point else out

    def files(self) -> Iterator[Path]:
        return (piece.file for piece in self.pieces)


def run_pieces(
    file: Path, at: int, begin: int, count: int, shape: tuple[int, ...], itemsize: int
) -> list[Piece]:
    """The pieces for elements [begin, begin + count) of the flattened tensor, which are stored from
    byte `at`: at most a part of a row, whole rows, and a part of a row."""
    columns = shape[-1] if len(shape) > 1 else 1
    pieces = []
    matrix = (math.prod(shape) // columns, columns) if columns else (0, 0)
    for (top, left), (height, width) in boxes(begin, count, matrix):
        pieces.append(Piece(file, at, (top, top + height), (left, left + width)))
        at += height * width * itemsize
    return pieces


def box_pieces(
    file: Path,
    at: int,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    shape: tuple[int, ...],
    itemsize: int,
) -> list[Piece]:
    """The pieces for the box [offsets, offsets + sizes) of a tensor of `shape`, which is stored
    contiguously from byte `at`."""
    if not math.prod(sizes):
        return []
    if len(shape) < 2:
        first = offsets[0] if shape else 0
        return [Piece(file, at, (first, first + (sizes[0] if shape else 1)), (0, 1))]
    columns = (offsets[-1], offsets[-1] + sizes[-1])
    height = sizes[-2]
    pieces = []
    for outer in itertools.product(
        *(range(o, o + n) for o, n in zip(offsets[:-2], sizes[:-2], strict=True))
    ):
        row = 0
        for index, size in zip(outer, shape[:-2], strict=True):
            row = row * size + index
        row = row * shape[-2] + offsets[-2]
        pieces.append(Piece(file, at, (row, row + height), columns))
        at += height * sizes[-1] * itemsize
    return pieces


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _cover_exactly(pieces: tuple[Piece, ...], rows: int, columns: int) -> bool:
    """Whether pieces, sorted by their rows, cover a rows × columns matrix without overlap.

    This holds if they have the matrix's area and each piece starts where the pieces above it end.
    """
    if sum(piece.size for piece in pieces) != rows * columns:
        return False
    covered = [(0, columns, 0)]  # disjoint column ranges and the first row not yet covered
    for piece in pieces:
        (top, bottom), (left, right) = piece.rows, piece.columns
        if not (left >= 0 and right <= columns and bottom <= rows):
            return False
        above = [(max(b, left), min(e, right), row) for b, e, row in covered]
        if any(begin < end and row != top for begin, end, row in above):
            return False
        beside = [(b, min(e, left), row) for b, e, row in covered]
        beside += [(max(b, right), e, row) for b, e, row in covered]
        covered = [*(part for part in beside if part[0] < part[1]), (left, right, bottom)]
    return True
