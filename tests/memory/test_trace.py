"""Which layers a short trace has, and what is known of a model before it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launcher.memory import load_and_save, zero
from launcher.memory.dry_run import fake_model
from launcher.memory.trace import cut_layers, repetition
from tests.memory.test_search import LAYERS, config


@pytest.mark.parametrize(
    ("kinds", "alone", "period"),
    [("aaaaaaaa", 0, 1), ("baaaaaaa", 1, 1), ("abababab", 0, 2), ("cabababa", 1, 2), ("abc", 0, 3)],
)
def test_a_repetition_of_layers_is_found(kinds: str, alone: int, period: int) -> None:
    assert repetition(kinds) == (alone, period)


@pytest.mark.parametrize(
    ("distance", "kept", "keeps_all"),
    [(0, 0, False), (10**9, 0, True), (900_000, 2, False), (255_000, 0, False)],
)
def test_zero3_keeps_the_layers_that_are_used_again_soon(
    distance: int, kept: int, keeps_all: bool, tmp_path: Path
) -> None:
    """A layer has 185,000 elements, the head 128,000: it and the layers behind are used twice."""
    extra = {"zero_optimization": {"stage3_max_reuse_distance": distance}}
    asked = config(tmp_path, strategy={"name": "zero3", "extra": extra})
    built = fake_model(asked)
    assert zero.layers_kept_gathered(built, asked) == kept
    assert zero.keeps_all_gathered(built, asked) is keeps_all
    assert cut_layers(built, asked, more=0, min_layers=1) == (LAYERS, max(3, 2 + kept))
    assert zero.without_prefetch(asked).strategy.prefetch_bucket_size == 0  # type: ignore[attr-defined]
    other = dataclasses.replace(asked, strategy=config(tmp_path).strategy)
    assert zero.without_prefetch(other) == other
    assert zero.layers_kept_gathered(fake_model(other), other) == 0


@pytest.mark.parametrize(
    ("bucket", "live", "distance", "most"),
    [
        (1, 500_000, 0, 500_000 + 128 * 352),  # up to the limit, and the weight that reaches it
        (1, 10**9, 0, 7 * 184_576 + 2 * 128_000 + 128),  # the whole model
        (0, 500_000, 0, 0),
        (1, 500_000, 10**9, 0),  # it keeps everything
    ],
)
def test_zero3_gathers_ahead_up_to_a_limit(
    bucket: int, live: int, distance: int, most: int, tmp_path: Path
) -> None:
    limits = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": distance}
    options = {"prefetch_bucket_size": bucket, "extra": {"zero_optimization": limits}}
    asked = config(tmp_path, strategy={"name": "zero3", **options})
    assert zero.most_gathered(fake_model(asked), asked) == most


BUCKET = {"reduce_bucket_size": 460_000}  # elements: the gradients of two and a half layers


@pytest.mark.parametrize(
    ("method", "strategy", "layers"),
    [("full", "zero2", 3), ("full", "zero3", 3), ("lora", "zero2", 0), ("full", "fsdp", 0)],
)
def test_traces_have_the_layers_that_fill_a_bucket(
    method: str, strategy: str, layers: int, tmp_path: Path
) -> None:
    options = BUCKET if strategy.startswith("zero") else {}
    asked = config(tmp_path, method={"name": method}, strategy={"name": strategy, **options})
    built = fake_model(asked)
    assert zero.layers_in_a_bucket(built, asked) == layers
    if strategy == "zero2":
        assert cut_layers(built, asked, more=0, min_layers=1) == (LAYERS, max(3, 2 + layers))


def test_layers_are_cut_behind_those_that_differ(tmp_path: Path) -> None:
    asked = config(tmp_path, "experts")
    assert cut_layers(fake_model(asked), asked, more=0, min_layers=1) == (LAYERS, 4)
    assert cut_layers(fake_model(asked), asked, more=1, min_layers=5) == (LAYERS, 6)


@pytest.mark.parametrize("model", ["llama", "experts"])
def test_models_are_read_in_slices_as_far_as_their_config_tells(model: str, tmp_path: Path) -> None:
    asked = config(tmp_path, model, method={"name": "full"})
    built = fake_model(asked)
    assert not load_and_save.reads_whole_model(asked, built)
    elements = sum(parameter.numel() for parameter in built.parameters())
    assert load_and_save.whole_model_bytes(asked, built) == 4 * elements  # masters
    built.requires_grad_(False)
    assert load_and_save.whole_model_bytes(asked, built) == 2 * elements
