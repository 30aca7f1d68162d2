"""loss.png: the loss over the steps."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.charts import smooth
from launcher.metrics import Record


class LossPlot:
    """Draws metrics.jsonl when the run ends."""

    def __init__(self, metrics: Path, picture: Path) -> None:
        self.metrics = metrics
        self.picture = picture

    def start(self, done_steps: int, total_steps: int) -> None: ...

    def log(self, records: list[Record]) -> None: ...

    def finish(self) -> None:
        draw_loss(self.metrics, self.picture)


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draw the training loss, its moving average and the evaluation loss of a metrics.jsonl."""
    from matplotlib.figure import Figure  # half a second to import, needed once a run

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [(record["step"], record["loss"]) for record in records if "loss" in record]
    evaluated = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if not steps:
        return  # stopped before the first step
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*steps, strict=True), color="tab:blue", alpha=0.35, label="loss")
    axes.plot([s for s, _ in steps], smooth([loss for _, loss in steps]), label="smoothed")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:red", label="evaluation loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token")
    axes.set_title(metrics.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
