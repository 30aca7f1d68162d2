"""Rows are packed tightly, once each."""

from __future__ import annotations

import numpy as np
import pytest

from launcher.data.packing import Sequences, one_row_each, pack


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    """Like instruction data: many rows are short, some are at the limit."""
    drawn = np.random.default_rng(seed).lognormal(5, 0.8, count)
    return np.clip(drawn, 3, 2048).astype(np.int32)


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as in a textbook; returns how full each sequence is."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, full in enumerate(filled) if full + length <= capacity]
        if fitting:
            filled[max(fitting, key=lambda at: filled[at])] += length
        else:
            filled.append(length)
    return sorted(filled)


def filled(packed: Sequences, lengths: np.ndarray) -> list[int]:
    return [int(sum(lengths[row] for row in packed[at])) for at in range(len(packed))]


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_best_fit_decreasing(seed: int) -> None:
    lengths = lengths_of(300, seed)
    packed = pack(np.arange(300), lengths, 2048)
    assert sorted(filled(packed, lengths)) == best_fit(lengths.tolist(), 2048)
    rows = [row for at in range(len(packed)) for row in packed[at]]
    assert sorted(rows) == list(range(300)), "every row once"


def test_no_sequence_exceeds_the_maximum_length_and_little_is_wasted() -> None:
    lengths = lengths_of(20_000)
    full = filled(pack(np.arange(20_000), lengths, 2048), lengths)
    assert max(full) <= 2048
    assert sum(full) / (len(full) * 2048) > 0.995


def test_rows_keep_their_numbers() -> None:
    packed = pack(np.array([7, 9, 11]), np.array([5, 4, 6]), 10)
    assert sorted(row for at in range(len(packed)) for row in packed[at]) == [7, 9, 11]
    assert filled(packed, {7: 5, 9: 4, 11: 6}) == [10, 5]  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [[], [10], [10, 10], [1] * 10])
def test_edge_cases_match_best_fit(lengths: list[int]) -> None:
    packed = pack(np.arange(len(lengths)), np.array(lengths, np.int32), 10)
    assert sorted(filled(packed, np.array(lengths))) == best_fit(lengths, 10)


def test_one_row_each_stores_only_a_range() -> None:
    sequences = one_row_each(range(10**12))
    assert len(sequences) == 10**12
    assert sequences[10**11] == [10**11]
