"""Those who watch a run: metrics.jsonl, the console, the plot. All on rank 0."""

from __future__ import annotations

from io import TextIOBase

from launcher.config.tracking import TrackingConfig
from launcher.run_dir import RunDir
from launcher.tracking.console import Progress
from launcher.tracking.jsonl import MetricsFile
from launcher.tracking.plot import LossPlot


def build_observers(
    config: TrackingConfig, run: RunDir, console: TextIOBase
) -> list[MetricsFile | Progress | LossPlot]:
    observers: list[MetricsFile | Progress | LossPlot] = [
        MetricsFile(run.metrics, run.logs / "lost-metrics.jsonl")
    ]
    if config.progress:
        observers.append(Progress(console))
    if config.plot:
        observers.append(LossPlot(run.metrics, run.plot))
    return observers
