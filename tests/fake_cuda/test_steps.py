"""What a step sends and where the host waits, on a CUDA device that does not exist: as
docs/communication.md says, and no tensor is on a wrong device.

`make test` runs cells that contain every pair of values, `make test-all` runs all cells. After a
change: `make communication`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers.fake_cuda import Seen, page
from tests.helpers.fake_cuda.cells import GRID, Cell
from tests.helpers.pairs import cover

# A wrapped router before wrapped experts, whose order DeepSpeed records.
ADAPTED_EXPERTS = Cell("zero3", "lora", "plain", "glm4_moe")
CHOSEN = {*cover(GRID), ADAPTED_EXPERTS}
CELLS = [
    pytest.param(cell, id=str(cell), marks=() if cell in CHOSEN else pytest.mark.whole)
    for cell in GRID
]
PAGE = page.read(page.PAGE.read_text(encoding="utf-8"))
OFFLOADED = ("fsdp_offload", "zero3_offload")
STEPPED_ON_THE_CPU = (*OFFLOADED, "zero2_offload")


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_sends_and_waits_as_documented(look: Callable[[Cell], Seen], cell: Cell) -> None:
    seen = look(cell)
    sent, waited = page.lines_of(cell, seen)
    documented = PAGE[cell.strategy].of(cell)
    assert sent == documented[0]
    assert waited == documented[1]
    assert seen.devices == {
        "parameters": ["cpu" if cell.strategy in OFFLOADED else "cuda"],
        "buffers": ["cuda"],
        "moments": ["cpu" if cell.strategy in STEPPED_ON_THE_CPU else "cuda"],
    }


def test_make_test_covers_every_pair_of_values() -> None:
    def pairs(cells: set[Cell]) -> set[object]:
        axes = range(len(Cell._fields))
        return {(a, cell[a], b, cell[b]) for cell in cells for a in axes for b in range(a)}

    assert pairs(CHOSEN) == pairs(set(GRID))


def test_the_page_is_read_as_it_was_written() -> None:
    assert set(PAGE) == {cell.strategy for cell in GRID}
    for strategy, section in PAGE.items():
        shown = page.shown_of(strategy)
        for choices in (*section.sent.values(), *section.waited.values()):
            assert page.choices_in(page.words(choices, shown), shown) == choices
