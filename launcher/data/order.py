"""The order of an epoch. Any part of it is known in O(1) from seed and epoch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 1024  # rows that lie together in a file and stay near each other
BLOCKS_AT_ONCE = 64  # among which rows are shuffled
STEPS_AT_ONCE = 50  # whose sequences are sorted by length


class Order(Protocol):
    def __call__(self, epoch: int, begin: int, end: int) -> list[int]:
        """The sequences at places [begin, end) of an epoch."""


def in_order(epoch: int, begin: int, end: int) -> list[int]:
    return list(range(begin, end))


@dataclass(frozen=True)
class Shuffled:
    """Another permutation every epoch."""

    seed: int
    length: int

    def __call__(self, epoch: int, begin: int, end: int) -> list[int]:
        return [int(at) for at in _permutation(self.seed, epoch, self.length)[begin:end]]


class Grouped:
    """Shuffled, then sorted by length among the sequences of some steps, and these steps shuffled:
    a step holds sequences of like length, and any sequence may come at any time."""

    def __init__(self, seed: int, lengths: NDArray[np.int64], step: int) -> None:
        self.seed = seed
        self.lengths = lengths
        self.step = step  # sequences of a step
        self._order = functools.lru_cache(maxsize=2)(self._of_epoch)

    def __call__(self, epoch: int, begin: int, end: int) -> list[int]:
        return [int(at) for at in self._order(epoch)[begin:end]]

    def _of_epoch(self, epoch: int) -> NDArray[np.int64]:
        order = _permutation(self.seed, epoch, len(self.lengths))
        steps: list[NDArray[np.int64]] = []
        for at in range(0, len(order), STEPS_AT_ONCE * self.step):
            part = order[at : at + STEPS_AT_ONCE * self.step]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            steps += [part[each : each + self.step] for each in range(0, len(part), self.step)]
        whole = [step for step in steps if len(step) == self.step]
        rest = [step for step in steps if len(step) < self.step]  # the epoch's last step
        places = np.random.default_rng((self.seed, epoch)).permutation(len(whole))
        return np.concatenate([*(whole[at] for at in places), *rest])


@dataclass(frozen=True)
class Blocks:
    """For rows that are read where they lie: blocks of neighbours are shuffled, and then the rows
    of some blocks among each other. Nothing as long as the data is held."""

    seed: int
    length: int

    def __call__(self, epoch: int, begin: int, end: int) -> list[int]:
        group = BLOCK * BLOCKS_AT_ONCE
        found: list[int] = []
        while begin < end:
            number, at = divmod(begin, group)
            part = self._group(epoch, number)[at : at + end - begin]
            found += part.tolist()
            begin += len(part)
        return found

    def _group(self, epoch: int, number: int) -> NDArray[np.int64]:
        return _group(self.seed, epoch, self.length, number)


@functools.lru_cache(maxsize=4)
def _group(seed: int, epoch: int, length: int, number: int) -> NDArray[np.int64]:
    whole = length // BLOCK  # the block that is not whole comes last
    blocks = _permutation(seed, epoch, whole)[
        number * BLOCKS_AT_ONCE : (number + 1) * BLOCKS_AT_ONCE
    ]
    rows = (blocks[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
    if len(blocks) < BLOCKS_AT_ONCE:
        rows = np.concatenate([rows, np.arange(whole * BLOCK, length)])
    return np.random.default_rng((seed, epoch, number)).permutation(rows)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """One epoch's order: drawn once, not at every step."""
    drawn = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    order: NDArray[np.int64] = torch.randperm(length, generator=drawn).numpy()
    return order
