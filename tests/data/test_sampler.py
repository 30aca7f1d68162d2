"""The order of an epoch: every sequence once, reshuffled each epoch, fixed by the seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from launcher.data import sampler
from launcher.data.sampler import (
    BlockShuffleSampler,
    LengthGroupedSampler,
    RandomSampler,
    sequential,
)

LENGTH = 10_000
LENGTHS = np.random.default_rng(0).integers(1, 1000, LENGTH)


def shuffled(seed: int) -> RandomSampler:
    return RandomSampler(seed, LENGTH)


def grouped(seed: int) -> LengthGroupedSampler:
    return LengthGroupedSampler(seed, LENGTHS, 8)


def blocks(seed: int) -> BlockShuffleSampler:
    return BlockShuffleSampler(seed, LENGTH)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "BLOCK_ROWS", 64)
    monkeypatch.setattr(sampler, "BLOCKS_PER_GROUP", 10)
    sampler._shuffled_group.cache_clear()


@pytest.mark.parametrize("kind", [shuffled, grouped, blocks])
def test_every_epoch_is_a_different_permutation(kind: Any) -> None:
    first, second = (kind(1)(epoch, 0, LENGTH) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(LENGTH))
    assert first != second
    assert kind(1)(0, 0, LENGTH) == first
    assert kind(2)(0, 0, LENGTH) != first


@pytest.mark.parametrize("kind", [shuffled, grouped, blocks])
def test_a_range_of_an_epoch_equals_the_same_range_of_all_of_it(kind: Any) -> None:
    made = kind(1)
    whole = made(3, 0, LENGTH)
    for begin, end in ((0, 8), (635, 650), (9_990, 10_000), (100, 100)):
        assert kind(1)(3, begin, end) == whole[begin:end]


def test_the_sequential_sampler_keeps_the_order() -> None:
    assert sequential(5, 3, 6) == [3, 4, 5]


def test_grouped_steps_contain_similar_lengths() -> None:
    """There is less padding than in random order, and long sequences occur at any time."""
    found = LENGTHS[grouped(1)(0, 0, LENGTH)].reshape(-1, 8)
    chance = LENGTHS[shuffled(1)(0, 0, LENGTH)].reshape(-1, 8)
    padding = [1 - steps.sum() / (steps.max(axis=1) * 8).sum() for steps in (found, chance)]
    assert padding[0] < 0.05 < 0.3 < padding[1]
    halves = found[:625].mean(), found[625:].mean()
    assert abs(halves[0] - halves[1]) < 60
    grows = np.diff(found.mean(axis=1)) > 0
    assert 0.4 < grows.mean() < 0.6, "from step to step; in sorted groups nearly never"


def test_the_block_sampler_reads_few_blocks_of_a_file_at_a_time() -> None:
    found = blocks(1)(0, 0, 640)
    assert len({row // 64 for row in found}) == 10, "of 157 blocks"
    assert np.abs(np.diff(found)).mean() > 640, "mixed among each other"
