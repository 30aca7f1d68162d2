"""Which rows of the sources are held out for evaluation, and which rows an epoch trains on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.config.schema.data import DataConfig, SourceConfig
from launcher.errors import UserError

RowNumbers = NDArray[np.int64]


def split_rows(rows: int, config: DataConfig, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """(training, evaluation) row numbers, each in ascending order.

    The split is the same for the same seed and number of rows. Raises UserError if one part would
    be empty.
    """
    setting = f"data.eval_rows={config.eval_rows}"
    if config.eval_fraction:
        setting = f"data.eval_fraction={config.eval_fraction}"
    eval_rows = round(rows * config.eval_fraction) if config.eval_fraction else config.eval_rows
    if config.eval_fraction and eval_rows == 0:
        raise UserError(f"{setting} of {rows} rows is zero rows; increase it")
    if eval_rows >= rows:
        raise UserError(f"{setting}: {eval_rows} of {rows} rows leave nothing to train on")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).numpy()
    return np.sort(order[eval_rows:]), np.sort(order[:eval_rows])


def mix_sources(
    training: RowNumbers,
    sizes: Sequence[int],
    sources: dict[str, SourceConfig],
    config: DataConfig,
    seed: int,
) -> RowNumbers:
    """The rows of an epoch.

    `training` are row numbers in ascending order, over sources that are concatenated and have
    `sizes` rows. With `data.mixing=interleave`, each next row comes from a random source, with the
    probability of its weight, until one source is used up or (`all_exhausted`) all are; used-up
    sources then start again from their first row. This is the rule of
    `datasets.interleave_datasets`. All epochs have the same rows.
    """
    if config.mixing == "concatenate" or len(sizes) == 1:
        return training
    bounds = np.searchsorted(training, np.cumsum([0, *sizes]))
    parts = [training[begin:end] for begin, end in pairwise(bounds)]
    if empty := [name for name, part in zip(sources, parts, strict=True) if not len(part)]:
        raise UserError(
            f"data.mixing=interleave: no row of data source {empty[0]} is left to draw from"
        )
    weights = np.asarray([source.weight for source in sources.values()])
    drawn_sources = _draw_sources(
        np.asarray([len(part) for part in parts]),
        weights / weights.sum(),
        config.stopping == "all_exhausted",
        np.random.default_rng(seed),
    )
    mixed = np.empty(len(drawn_sources), np.int64)
    for number, part in enumerate(parts):
        positions = np.flatnonzero(drawn_sources == number)
        mixed[positions] = np.resize(part, len(positions))  # repeats the part
    return mixed


def _draw_sources(
    sizes: RowNumbers,
    probabilities: NDArray[np.float64],
    until_all: bool,
    generator: np.random.Generator,
) -> RowNumbers:
    """The number of the source of each row, until the first or (`until_all`) the last source is
    used up."""
    drawn = np.empty(0, np.int64)
    while True:
        more = generator.choice(len(sizes), size=max(1024, int(sizes.sum())), p=probabilities)
        drawn = np.concatenate([drawn, more])
        lengths = [_prefix_length(drawn == number, size) for number, size in enumerate(sizes)]
        known = [length for length in lengths if length is not None]
        if known and not until_all:
            return drawn[: min(known)]
        if len(known) == len(sizes):
            return drawn[: max(known)]


def _prefix_length(mask: NDArray[np.bool_], count: int) -> int | None:
    """The length of the shortest prefix of `mask` with `count` true values; None if it has
    fewer."""
    positions = np.flatnonzero(mask)
    return int(positions[count - 1]) + 1 if len(positions) >= count else None
