"""Rows into sequences: one each, or as many as fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sequences:
    """Sequence i holds `rows[starts[i] : starts[i + 1]]`."""

    rows: Sequence[int] | NDArray[np.int64]  # row numbers
    starts: Sequence[int] | NDArray[np.int64]  # [sequences + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> list[int]:
        return [int(row) for row in self.rows[self.starts[number] : self.starts[number + 1]]]


def one_each(rows: Any) -> Sequences:
    return Sequences(rows, range(len(rows) + 1))


def pack(rows: NDArray[np.int64], lengths: NDArray[Any], capacity: int) -> Sequences:
    """Best-fit decreasing: the longest row first, each into the sequence with the least room that
    holds it. `lengths` [rows], none above `capacity`.

    The rooms that are open are the bits of one integer, so the least that is enough is found by a
    shift and its lowest bit; a million rows take seconds.
    """
    open_with: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # room → sequences
    rooms = 0  # bit r: a sequence has room for r tokens
    packed: list[list[int]] = []
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    for at, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            sequence = open_with[room].pop()
            if not open_with[room]:
                rooms &= ~(1 << room)
        else:
            room, sequence = capacity, []
            packed.append(sequence)
        sequence.append(at)
        if left := room - length:
            open_with[left].append(sequence)
            rooms |= 1 << left
    counts = [0, *map(len, packed)]
    order = np.fromiter((at for sequence in packed for at in sequence), np.int64, len(rows))
    return Sequences(rows[order], np.cumsum(counts))
