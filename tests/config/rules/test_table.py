"""Messages for broken rules. test_rules.py checks that each can be broken and fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.commands.fetch import MODELS
from launcher.config import Config, store
from launcher.config.rules import table
from launcher.config.rules.rule import World
from launcher.folders.model import is_hub_id
from tests.helpers.compose import composed_raw

ONE = World(nodes=1, nproc_per_node=1)
TWO = World(nodes=1, nproc_per_node=2)


@pytest.fixture
def good(tiny: Path, rows_file: Path) -> dict[str, dict[str, Any]]:
    return {
        "model": {"name_or_path": str(tiny)},
        "data": {"path": str(rows_file)},
        "training": {"epochs": 1, "global_batch_size": 8, "micro_batch_size": 2},
    }


def build(good: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]) -> Config:
    merged = {s: {**good.get(s, {}), **changes.get(s, {})} for s in {**good, **changes}}
    return store.build(composed_raw(**merged))


def broken_ids(config: Config, world: World) -> set[str]:
    return {line.rpartition("[")[2].rstrip("]") for line in table.broken_rules(config, world)}


def test_several_broken_rules_are_all_reported(good: dict[str, dict[str, Any]]) -> None:
    config = build(good, {"strategy": {"name": "single"}, "training": {"global_batch_size": 3}})
    assert broken_ids(config, TWO) == {"single-is-one-rank", "batch-divides"}


def test_the_batch_size_message_names_values_and_the_fix(good: dict[str, dict[str, Any]]) -> None:
    (line,) = table.broken_rules(build(good, {"training": {"global_batch_size": 7}}), TWO)
    assert line == (
        "training.global_batch_size=7 is not a multiple of 2 ranks × training.micro_batch_size=2 "
        "→ training.global_batch_size=8 [batch-divides]"
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_message_for_a_fetchable_model_gives_the_command(
    model: str, good: dict[str, dict[str, Any]], cache: Path
) -> None:
    missing = {"model": {"name": model, "name_or_path": str(cache / "models/none")}}
    (line,) = table.broken_rules(build(good, missing), ONE)
    assert f"→ shardway fetch {model}" in line


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("owner/model-1.5", True), ("model", False), ("/a/b", False), ("a/b/c", False)],
)
def test_hub_ids_are_distinguished_from_paths(name: str, is_id: bool) -> None:
    assert is_hub_id(name) is is_id
