"""Which rows are held out for evaluation, and how sources are mixed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from launcher.config.schema.data import DataConfig, SourceConfig
from launcher.data.mixing import mix_sources, split_rows
from launcher.errors import UserError

SIZES = (1000, 3000)
EQUAL = {"a": SourceConfig(), "b": SourceConfig()}


def mixed(*weights: float, sizes: Any = SIZES, seed: int = 1, **options: Any) -> Any:
    config = DataConfig(mixing="interleave", **options)
    sources = {name: SourceConfig(weight=w) for name, w in zip("ab", weights, strict=True)}
    return mix_sources(np.arange(sum(sizes)), sizes, sources, config, seed)


def test_the_same_seed_holds_out_the_same_rows() -> None:
    config = DataConfig(eval_rows=4)
    training, held_out = split_rows(13, config, seed=1)
    assert sorted([*training, *held_out]) == list(range(13))
    assert len(held_out) == 4
    assert split_rows(13, config, seed=1)[1].tolist() == held_out.tolist()
    assert split_rows(13, config, seed=2)[1].tolist() != held_out.tolist()
    with pytest.raises(UserError, match=r"data\.eval_rows=13: 13 of 13 rows leave nothing"):
        split_rows(13, DataConfig(eval_rows=13), seed=1)


def test_a_fraction_is_held_out() -> None:
    training, held_out = split_rows(200, DataConfig(eval_fraction=0.1), seed=1)
    assert (len(training), len(held_out)) == (180, 20)
    with pytest.raises(UserError, match=r"data\.eval_fraction=0\.01 of 13 rows is zero rows"):
        split_rows(13, DataConfig(eval_fraction=0.01), seed=1)


def test_an_epoch_ends_when_the_first_source_is_exhausted() -> None:
    rows = mixed(1, 1)
    counts = np.bincount(rows >= 1000)
    assert max(counts) <= 3000
    assert counts[0] == 1000, "the smaller one, all of it"
    assert len(set(rows.tolist())) == len(rows), "no row twice"
    assert abs(counts[1] - 1000) < 150, "drawn with equal chances"
    assert rows[rows < 1000].tolist() == list(range(1000)), "each in its own order"


def test_all_exhausted_repeats_the_smaller_source() -> None:
    rows = mixed(1, 1, stopping="all_exhausted")
    larger = rows[rows >= 1000].tolist()
    assert larger == list(range(1000, 4000)), "all of it, once"
    smaller = rows[rows < 1000]
    assert abs(len(smaller) - 3000) < 300
    assert smaller[:2500].tolist() == [*range(1000), *range(1000), *range(500)]


def test_weights_are_probabilities() -> None:
    rows = mixed(1, 3)
    share = (rows >= 1000).mean()
    assert 0.72 < share < 0.78
    assert mixed(1, 3).tolist() == rows.tolist()
    assert mixed(1, 3, seed=2).tolist() != rows.tolist()


def test_concatenation_takes_every_row_once() -> None:
    config = DataConfig()
    rows = mix_sources(np.arange(10, 30), SIZES, EQUAL, config, 1)
    assert rows.tolist() == list(range(10, 30))


def test_a_source_without_training_rows_is_named() -> None:
    with pytest.raises(UserError, match="no row of data source a is left"):
        mix_sources(np.arange(5, 9), (5, 4), EQUAL, DataConfig(mixing="interleave"), 1)
