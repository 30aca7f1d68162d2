"""A few cells of a grid that contain every pair of values of any two axes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

Cell = tuple[Any, ...]  # one value of each axis
Pair = tuple[tuple[int, Any], tuple[int, Any]]  # two of (number of the axis, value)


def pairs_of(cell: Cell) -> set[Pair]:
    return set(itertools.combinations(enumerate(cell), 2))


def cover(cells: Sequence[Cell]) -> list[Cell]:
    """A subset of `cells`, in their order, that covers every pair in them.

    Greedy: the next one has the most pairs that are still missing, and among such cells the pairs
    that were chosen least often.
    """
    pairs = [pairs_of(cell) for cell in cells]
    missing = set[Pair]().union(*pairs)
    uses = Counter[Pair]()
    chosen = set()
    while missing:
        best = max(
            range(len(cells)),
            key=lambda at: (len(pairs[at] & missing), -sum(uses[pair] for pair in pairs[at])),
        )
        chosen.add(best)
        missing -= pairs[best]
        uses.update(pairs[best])
    return [cells[at] for at in sorted(chosen)]
