"""loss.png: the loss over the steps."""

from __future__ import annotations

from pathlib import Path

from launcher.run.curves import RunMetrics
from launcher.tracking.base import Record


class LossPlot:
    """Draws loss.png from metrics.jsonl when the run ends."""

    def __init__(self, metrics: Path, picture: Path) -> None:
        self.metrics = metrics
        self.picture = picture

    def start(self, done_steps: int, total_steps: int) -> None: ...

    def log(self, records: list[Record]) -> None: ...

    def finish(self) -> None:
        draw_loss(self.metrics, self.picture)


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draw the training loss, its moving average and the evaluation loss of a metrics.jsonl.

    Draws nothing if it has no steps.
    """
    from matplotlib.figure import Figure  # half a second to import, needed once per run

    read = RunMetrics(metrics).update()
    losses, averages, eval_losses = read.points("loss"), read.smoothed("loss"), read.evaluations()
    if not losses:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.35, label="loss")
    axes.plot(*zip(*averages, strict=True), label="smoothed")
    if eval_losses:
        axes.plot(*zip(*eval_losses, strict=True), "o-", color="tab:red", label="evaluation loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token")
    axes.set_title(metrics.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
