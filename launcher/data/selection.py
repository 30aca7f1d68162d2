"""Which rows of several sources are trained on, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.config.data import DataConfig, SourceConfig
from launcher.errors import UserError

Numbers = NDArray[np.int64]  # of rows


def split(rows: int, config: DataConfig, seed: int) -> tuple[Numbers, Numbers]:
    """(training, evaluation) row numbers in order; the same for the same seed and data."""
    said = f"data.eval_rows={config.eval_rows}"
    if config.eval_fraction:
        said = f"data.eval_fraction={config.eval_fraction}"
    held = round(rows * config.eval_fraction) if config.eval_fraction else config.eval_rows
    if config.eval_fraction and held == 0:
        raise UserError(f"{said} of {rows} rows is none; raise it")
    if held >= rows:
        raise UserError(f"{said}: {held} rows leave nothing to train on, there are {rows}")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).numpy()
    return np.sort(order[held:]), np.sort(order[:held])


def mix(
    training: Numbers,
    sizes: Sequence[int],
    sources: dict[str, SourceConfig],
    config: DataConfig,
    seed: int,
) -> Numbers:
    """The rows of an epoch, of sources that stand one behind the other in `sizes` rows each.

    `data.mixing=interleave` draws each next row from a source with the probability of its weight,
    until one is used up, or (`all_exhausted`) all are, those that were used up beginning anew: the
    rule of `datasets.interleave_datasets`. The same rows are drawn for every epoch.
    """
    if config.mixing == "concatenate" or len(sizes) == 1:
        return training
    ends = np.searchsorted(training, np.cumsum([0, *sizes]))
    parts = [training[begin:end] for begin, end in pairwise(ends)]
    if empty := [name for name, part in zip(sources, parts, strict=True) if not len(part)]:
        raise UserError(
            f"data.mixing=interleave: nothing is left of data source {empty[0]} to draw from"
        )
    weights = np.asarray([source.weight for source in sources.values()])
    drawn = _draws(
        np.asarray([len(part) for part in parts]),
        weights / weights.sum(),
        config.stopping == "all_exhausted",
        np.random.default_rng(seed),
    )
    mixed = np.empty(len(drawn), np.int64)
    for number, part in enumerate(parts):
        places = np.flatnonzero(drawn == number)
        mixed[places] = np.resize(part, len(places))  # again from its beginning
    return mixed


def _draws(
    sizes: Numbers, shares: NDArray[np.float64], all_of_them: bool, draw: np.random.Generator
) -> Numbers:
    """The source of each row, until the first or the last of `sizes` is used up."""
    drawn = np.empty(0, np.int64)
    while True:
        more = draw.choice(len(sizes), size=max(1024, int(sizes.sum())), p=shares)
        drawn = np.concatenate([drawn, more])
        used_up = [_place_of(drawn == number, size) for number, size in enumerate(sizes)]
        known = [place for place in used_up if place is not None]
        if known and not all_of_them:
            return drawn[: min(known)]
        if len(known) == len(sizes):
            return drawn[: max(known)]


def _place_of(is_it: NDArray[np.bool_], count: int) -> int | None:
    """How many places hold the first `count` that are."""
    places = np.flatnonzero(is_it)
    return int(places[count - 1]) + 1 if len(places) >= count else None
