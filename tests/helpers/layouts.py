"""Strategies × ranks that test modules share: (strategy, ranks, options)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

Layout = tuple[str, int, dict[str, Any]]

ONE_OF_EACH: list[Layout] = [
    ("single", 1, {}),
    ("ddp", 2, {}),
    ("fsdp", 3, {}),
    ("hsdp", 4, {"shard_size": 2}),
    ("zero1", 2, {}),
    ("zero2", 3, {}),
    ("zero3", 3, {}),
]
OFFLOADED: list[Layout] = [
    ("fsdp_offload", 3, {}),
    ("hsdp", 4, {"shard_size": 2, "offload": True}),
    ("zero2_offload", 3, {}),
    ("zero3_offload", 2, {"persistence_threshold": 0}),  # otherwise tiny tensors are not sharded
]


def pairwise(layouts: Sequence[Layout], *choices: Sequence[Any]) -> list[Any]:
    """The grid of `layouts` × choices of two each, as parameters (*choices, *layout).

    Every pair of values is in a cell of `make test`; the other cells are in `make test-all`.
    """
    cells = []
    for number, layout in enumerate(layouts):
        for picks in itertools.product((0, 1), repeat=len(choices)):
            chosen = (number + sum(picks)) % 2 == 0
            values = [choice[pick] for choice, pick in zip(choices, picks, strict=True)]
            marks = () if chosen else (pytest.mark.whole,)
            cells.append(pytest.param(*values, *layout, marks=marks))
    return cells
