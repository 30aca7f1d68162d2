"""The parameters that a rank holds fall with the number of ranks, also for mixtures of experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.fake_cuda import Case, Seen, run
from tests.helpers.fake_cuda.cells import STRATEGIES

RANKS = (8, 64, 512)
SHARDED = ("fsdp", "zero3")
MODELS = ("llama", "mixtral", "glm4_moe")
# zero3 keeps small parameters whole (strategy.persistence_threshold), and FSDP2 pads rows: every
# dim of these models that is not one of the experts is a multiple of 512, or small.
SLACK = 1.03
WHOLE = 200_000  # bytes


@pytest.fixture(scope="module")
def held(models: Path) -> dict[tuple[str, str, int], Seen]:
    keys = [(s, m, ranks) for s in SHARDED for m in MODELS for ranks in RANKS]
    cases = [
        Case(
            str(models / model),
            (f"strategy={strategy}", "method=full", *STRATEGIES[strategy]),
            ranks=ranks,
        )
        for strategy, model, ranks in keys
    ]
    return dict(zip(keys, run(cases), strict=True))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", SHARDED)
def test_a_rank_holds_its_share(
    held: dict[tuple[str, str, int], Seen], strategy: str, model: str, ranks: int
) -> None:
    seen = held[strategy, model, ranks]
    assert not seen.error, seen.error
    assert seen.held_bytes <= SLACK * seen.full_bytes / ranks + WHOLE
    assert seen.held_bytes >= seen.full_bytes / ranks, "nothing is lost"
