"""The order of the sequences in an epoch. Each sampler computes any part of it from the seed and
the epoch alone, without going through the parts before it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_ROWS = 1024  # neighboring rows of a file, which stay near each other
BLOCKS_PER_GROUP = 64  # blocks whose rows are shuffled with each other
STEPS_PER_GROUP = 50  # steps whose sequences are sorted by length


class Sampler(Protocol):
    def __call__(self, epoch: int, begin: int, end: int) -> list[int]:
        """The sequences at positions [begin, end) of an epoch."""


def sequential(epoch: int, begin: int, end: int) -> list[int]:
    """A sampler that keeps the order of the sequences."""
    return list(range(begin, end))


@dataclass(frozen=True)
class RandomSampler:
    """A different permutation in every epoch."""

    seed: int
    length: int  # number of sequences

    def __call__(self, epoch: int, begin: int, end: int) -> list[int]:
        return [int(number) for number in _permutation(self.seed, epoch, self.length)[begin:end]]


class LengthGroupedSampler:
    """Steps of sequences of similar length.

    The sequences are shuffled and, in groups of several steps, sorted by length; then the steps are
    shuffled, so a sequence of any length may come at any time.
    """

    def __init__(self, seed: int, lengths: NDArray[np.int64], step_size: int) -> None:
        """`lengths`: tokens of each sequence, [sequences]; `step_size`: sequences of a step."""
        self.seed = seed
        self.lengths = lengths
        self.step_size = step_size
        self._order = functools.lru_cache(maxsize=2)(self._compute_order)

    def __call__(self, epoch: int, begin: int, end: int) -> list[int]:
        return [int(number) for number in self._order(epoch)[begin:end]]

    def _compute_order(self, epoch: int) -> NDArray[np.int64]:
        order = _permutation(self.seed, epoch, len(self.lengths))
        size, group_size = self.step_size, STEPS_PER_GROUP * self.step_size
        steps: list[NDArray[np.int64]] = []
        for start in range(0, len(order), group_size):
            group = order[start : start + group_size]
            group = group[np.argsort(-self.lengths[group], kind="stable")]
            steps += [group[begin : begin + size] for begin in range(0, len(group), size)]
        full = [step for step in steps if len(step) == size]
        rest = [step for step in steps if len(step) < size]  # the epoch's last step
        step_order = np.random.default_rng((self.seed, epoch)).permutation(len(full))
        return np.concatenate([*(full[number] for number in step_order), *rest])


@dataclass(frozen=True)
class BlockShuffleSampler:
    """For rows that are streamed from files: shuffles blocks of neighboring rows, and then the rows
    of several blocks with each other. Needs no memory for the order of all rows."""

    seed: int
    length: int  # number of rows

    def __call__(self, epoch: int, begin: int, end: int) -> list[int]:
        group_rows = BLOCK_ROWS * BLOCKS_PER_GROUP
        rows: list[int] = []
        while begin < end:
            number, offset = divmod(begin, group_rows)
            group = _shuffled_group(self.seed, epoch, self.length, number)
            part = group[offset : offset + end - begin]
            rows += part.tolist()
            begin += len(part)
        return rows


@functools.lru_cache(maxsize=4)
def _shuffled_group(seed: int, epoch: int, length: int, number: int) -> NDArray[np.int64]:
    full_blocks = length // BLOCK_ROWS  # a shorter block comes last
    blocks = _permutation(seed, epoch, full_blocks)[
        number * BLOCKS_PER_GROUP : (number + 1) * BLOCKS_PER_GROUP
    ]
    rows = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
    if len(blocks) < BLOCKS_PER_GROUP:
        rows = np.concatenate([rows, np.arange(full_blocks * BLOCK_ROWS, length)])
    return np.random.default_rng((seed, epoch, number)).permutation(rows)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """The random order of an epoch, cached because every step needs a part of it."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    order: NDArray[np.int64] = torch.randperm(length, generator=generator).numpy()
    return order
