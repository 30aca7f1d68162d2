"""The parameters that a rank holds fall with the number of ranks, also for mixtures of experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.fake_cuda import Case, Seen
from tests.helpers.fake_cuda.cells import MODELS, STRATEGIES

# A dim that is padded to the number of ranks is 512 or more, or small. zero3 keeps parameters
# whole that are not larger than strategy.persistence_threshold.
ROUNDING = 1.03
WHOLE = 200_000  # bytes


class Cell(NamedTuple):
    """One value for each axis."""

    strategy: str
    model: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy}-{self.model}-{self.ranks}"

    def case(self, models: Path) -> Case:
        words = (f"strategy={self.strategy}", "method=full", *STRATEGIES[self.strategy])
        return Case(str(models / self.model), words, ranks=self.ranks, trains=False)


CELLS = [Cell(*each) for each in itertools.product(("fsdp", "zero3"), MODELS, (8, 64, 512))]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_rank_holds_its_share(look: Callable[[Cell], Seen], cell: Cell) -> None:
    seen = look(cell)
    assert not seen.error, seen.error
    share = seen.full_bytes / cell.ranks
    assert share <= seen.held_bytes <= ROUNDING * share + WHOLE
