"""The loss curves of the arms, side by side: one panel per number of ranks."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from peers import figures
from peers.arms import Arm
from peers.process import Run


def draw(runs: list[Run], arms: list[Arm], path: Path) -> None:
    """Plot the loss per trained token over the trained tokens, for the first run of each arm."""
    numbers = sorted({run.ranks for run in runs})
    figure, panels = pyplot.subplots(
        1, len(numbers), figsize=(7 * len(numbers), 5), sharey=True, squeeze=False
    )
    for panel, ranks in zip(panels[0], numbers, strict=True):
        for arm in arms:
            if not (mine := figures.usable(runs, arm.name, ranks, 0)):
                continue
            steps = mine[0].steps
            seen = list(accumulate(step.trained_tokens for step in steps))
            losses = [step.loss for step in steps]
            panel.plot(seen, losses, "-" if arm.is_ours else "--", label=arm.name)
        panel.set_title(f"{ranks} rank{'s' * (ranks > 1)}")
        panel.set_xlabel("trained tokens")
        if panel.lines:
            panel.legend()
    panels[0][0].set_ylabel("loss per trained token")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
