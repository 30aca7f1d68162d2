"""From runs to figures: medians over rounds, ratios round by round, tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from peers.arms import SYSTEMS, Arm
from peers.process import Run

MB = 1e6


def packs(tokens: float, length: int, ranks: int) -> int:
    """The number of packs of `length` tokens closest to `tokens`, as a multiple of `ranks`."""
    return max(1, round(tokens / length / ranks)) * ranks


def rate(run: Run, key: str, warm_up: int) -> float:
    """`key` (tokens or trained_tokens) per second, after the first `warm_up` steps."""
    timed = run.steps[warm_up:]
    seconds = timed[-1].time - run.steps[warm_up - 1].time
    return float(sum(getattr(step, key) for step in timed) / seconds)


def usable(runs: Iterable[Run], arm: str, ranks: int, warm_up: int) -> list[Run]:
    """The runs of an arm that finished their warm-up, sorted by round."""
    mine = [run for run in runs if run.arm == arm and run.ranks == ranks]
    return sorted((run for run in mine if len(run.steps) > warm_up), key=lambda run: run.round)


def ratio(runs: list[Run], ours: str, theirs: str, ranks: int, warm_up: int) -> float | None:
    """Trained tokens per second, ours over theirs: the median of the ratios of each round, because
    the machine's speed drifts. None if no round has both."""
    rates = []
    for arm in (ours, theirs):
        mine = usable(runs, arm, ranks, warm_up)
        rates.append({run.round: rate(run, "trained_tokens", warm_up) for run in mine})
    both = rates[0].keys() & rates[1].keys()
    return statistics.median(rates[0][each] / rates[1][each] for each in both) if both else None


def apart(runs: list[Run], arm: str, other: str, ranks: int) -> float | None:
    """The maximum difference between the losses of two arms at the same step, relative to the loss
    of `other`. None if one of them has no steps."""
    pair = [usable(runs, name, ranks, 0) for name in (arm, other)]
    if not all(pair):
        return None
    steps = zip(pair[0][0].steps, pair[1][0].steps, strict=False)
    return max(abs(mine.loss - its.loss) / abs(its.loss) for mine, its in steps)


def unlike(runs: list[Run], arms: Iterable[Arm], ranks: int) -> list[str]:
    """The sequential arms whose trained tokens per step differ from those of the first arm."""
    seen = {
        arm.name: [step.trained_tokens for step in mine[0].steps]
        for arm in arms
        if arm.sequential and (mine := usable(runs, arm.name, ranks, 0))
    }
    first = next(iter(seen.values()), [])
    return [
        name
        for name, counts in seen.items()
        if any(a != b for a, b in zip(counts, first, strict=False))
    ]


def agreement(runs: list[Run], arms: list[Arm], ranks: int) -> str:
    """A sentence that reports whether the arms with the same rows in the same steps trained on the
    same tokens and had the same losses."""
    seen = [arm for arm in arms if arm.sequential and usable(runs, arm.name, ranks, 0)]
    if len(seen) < 2:
        return ""
    first, *others = seen
    differ = unlike(runs, arms, ranks)
    found = ((arm, apart(runs, arm.name, first.name, ranks)) for arm in others)
    losses = ", ".join(f"{arm.name} {gap:.1e}" for arm, gap in found if gap is not None)
    tokens = f"**not** in {', '.join(differ)}" if differ else "in all of them"
    return (
        f"Same rows a step: as many trained tokens as {first.name} {tokens}; losses of a step "
        f"differ from its by at most (relative): {losses}.\n"
    )


def table(runs: list[Run], arms: list[Arm], ranks: int, warm_up: int) -> str:
    """A Markdown table with one row per arm."""
    heads = (
        "| | | trained tokens/s | tokens/s | first step | peak RSS of a rank "
        "| trained tokens | last loss |\n|---|---|--:|--:|--:|--:|--:|--:|\n"
    )
    return heads + "".join(_row(runs, arm, ranks, warm_up) for arm in arms)


def _row(runs: list[Run], arm: Arm, ranks: int, warm_up: int) -> str:
    head = f"| {SYSTEMS[arm.system]} | {arm.says} |"
    mine = usable(runs, arm.name, ranks, warm_up)
    if not mine:
        return f"{head} {_why_not(runs, arm, ranks)} | | | | | |\n"
    trained, tokens = (
        statistics.median(rate(run, key, warm_up) for run in mine)
        for key in ("trained_tokens", "tokens")
    )
    first = statistics.median(run.first_step_seconds for run in mine)
    peak = max(run.peak_rss for run in mine) / MB
    steps = mine[0].steps
    seen = sum(step.trained_tokens for step in steps)
    return (
        f"{head} {trained:,.1f} | {tokens:,.1f} | {first:.1f} s | {peak:,.0f} MB "
        f"| {seen:,} in {len(steps)} steps | {steps[-1].loss:.3f} |\n"
    )


def _why_not(runs: list[Run], arm: Arm, ranks: int) -> str:
    mine = [run for run in runs if run.arm == arm.name and run.ranks == ranks]
    failed = next((run.failed for run in mine if run.failed), None)
    return f"failed: {failed}" if failed else "too slow for the time it had" if mine else "not run"


def ratios(runs: list[Run], arms: list[Arm], ranks: int, warm_up: int) -> str:
    """A Markdown table of the ratio of every arm of ours to every arm of theirs."""
    ours, theirs = ([arm for arm in arms if arm.is_ours is mine] for mine in (True, False))
    lines = [f"| trained tokens/s against | {' | '.join(arm.name for arm in theirs)} |"]
    lines.append("|---|" + "--:|" * len(theirs))
    for arm in ours:
        found = [ratio(runs, arm.name, other.name, ranks, warm_up) for other in theirs]
        cells = ["–" if each is None else f"{each:.2f}" for each in found]
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
