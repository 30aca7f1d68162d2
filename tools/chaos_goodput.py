"""The share of the time in which a large run trains, from measured seconds and a published rate of
failures.

Meta counted 419 unexpected interruptions of Llama 3 405B in 54 days on 16,384 GPUs ("The Llama 3
Herd of Models", 2024, section 3.3.4): one in 50,700 hours of a GPU. Failures are taken as
independent, so a run on N ranks has one in 50,700 / N hours.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

GPU_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419
DAYS, RUNS = 54, 40


@dataclass(frozen=True)
class Costs:
    """What saving and failing cost, in seconds."""

    save: float  # training waits this long for a checkpoint
    notice: float  # from a fault to the end of the attempt
    go_on: float  # from the fault to the first step of the next attempt, `notice` included


def mean_seconds_between_failures(ranks: int) -> float:
    """For a whole run on `ranks` GPUs."""
    return GPU_HOURS_PER_FAILURE * 3600 / ranks


def best_interval(ranks: int, save: float) -> float:
    """Seconds of training between two checkpoints with the least loss (Young, 1974)."""
    return math.sqrt(2 * save * mean_seconds_between_failures(ranks))


def simulated_goodput(ranks: int, costs: Costs, seed: int) -> float:
    """The share of DAYS in which `ranks` GPUs do steps that are kept, over RUNS runs.

    Failures come at random; each loses the training since the last checkpoint and `go_on` seconds.
    One that comes during a restart begins it anew.
    """
    chance = random.Random(seed)
    mean, interval = mean_seconds_between_failures(ranks), best_interval(ranks, costs.save)
    useful = total = 0.0
    for _ in range(RUNS):
        left = DAYS * 86_400.0
        total += left
        restarting = 0.0
        while left > 0:
            until_failure = min(left, chance.expovariate(1 / mean))
            left -= until_failure
            trained = max(0.0, until_failure - restarting)
            saved = int(trained / (interval + costs.save)) * interval
            is_end = left <= 0
            rest = trained - saved / interval * (interval + costs.save)
            useful += saved + (min(rest, interval) if is_end else 0.0)
            restarting = costs.go_on
    return useful / total


def table(costs: Costs, seed: int) -> list[str]:
    """Lines of Markdown: goodput of some numbers of ranks with these costs."""
    lines = [
        "| ranks | hours between failures | minutes between checkpoints | simulated goodput |",
        "|--:|--:|--:|--:|",
    ]
    for ranks in (128, 1024, 16_384):
        hours = mean_seconds_between_failures(ranks) / 3600
        minutes = best_interval(ranks, costs.save) / 60
        share = simulated_goodput(ranks, costs, seed)
        lines.append(f"| {ranks:,} | {hours:,.1f} | {minutes:.0f} | {share:.2%} |")
    return lines
