"""A chunked head of a model that caps its logits trains like whole logits, under every kind of
sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import parts
from tests.helpers.parts import Case
from tests.helpers.tiny_models import release


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gemma2"
    release("gemma2", folder)
    return folder


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_losses_equal_those_of_whole_logits(
    ranks: Any, gemma: Path, rows_file: Path, strategy: str
) -> None:
    case = Case(gemma, rows_file, method="full", strategy=strategy, steps=4)
    found = ranks.run(2, parts.losses, case)[0]
    expected = ranks.run(2, parts.losses, case.with_training(loss="whole"))[0]
    assert found == pytest.approx(expected, rel=1e-5)
