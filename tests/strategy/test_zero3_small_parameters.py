"""Small parameters of zero3 travel in buckets. What a step sends: tests/fake_cuda/."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from launcher.strategy.zero3_small_parameters import _buckets


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([3, 3, 3], [[3, 3], [3]]),
        ([2, 4, 7, 1], [[2, 4], [7], [1]]),  # larger than a bucket: alone
    ],
)
def test_neighbors_share_a_bucket(sizes: list[int], expected: list[list[int]]) -> None:
    found = _buckets([SimpleNamespace(ds_numel=size) for size in sizes], 6)
    assert [[each.ds_numel for each in bucket] for bucket in found] == expected
