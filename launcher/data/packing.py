"""Rows to sequences: one row each, or as many as fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sequences:
    """Sequence i has `rows[starts[i] : starts[i + 1]]`."""

    rows: Sequence[int] | NDArray[np.int64]  # row numbers
    starts: Sequence[int] | NDArray[np.int64]  # [sequences + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> list[int]:
        return [int(row) for row in self.rows[self.starts[number] : self.starts[number + 1]]]


def one_row_each(rows: Sequence[int] | NDArray[np.int64]) -> Sequences:
    return Sequences(rows, range(len(rows) + 1))


def pack(rows: NDArray[np.int64], lengths: NDArray[np.integer], capacity: int) -> Sequences:
    """Best-fit decreasing: the rows from longest to shortest, each into the sequence with the least
    free space that is enough. `lengths` [rows]: tokens of each row, at most `capacity`.

    The amounts of free space that occur are the set bits of one integer. A shift and the lowest set
    bit give the smallest one that is enough, so a million rows take seconds.
    """
    with_space: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # space → sequences
    spaces = 0  # bit s is set: a sequence has space for s tokens
    packed: list[list[int]] = []
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    for index, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            sequence = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, sequence = capacity, []
            packed.append(sequence)
        sequence.append(index)
        if remaining := space - length:
            with_space[remaining].append(sequence)
            spaces |= 1 << remaining
    counts = [0, *map(len, packed)]
    order = np.fromiter((index for sequence in packed for index in sequence), np.int64, len(rows))
    return Sequences(rows[order], np.cumsum(counts))
