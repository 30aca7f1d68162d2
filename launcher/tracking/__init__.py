"""Those who watch a run: metrics.jsonl, the console, the plot, trackers. All on rank 0."""

from __future__ import annotations

from io import TextIOBase
from typing import TYPE_CHECKING

from launcher.config.tracking import TrackingConfig
from launcher.run_dir import RunDir
from launcher.tracking.console import Progress
from launcher.tracking.jsonl import MetricsFile
from launcher.tracking.plot import LossPlot

if TYPE_CHECKING:
    from launcher.loop import Observer


def build_observers(config: TrackingConfig, run: RunDir, console: TextIOBase) -> list[Observer]:
    metrics = MetricsFile(run.metrics, run.logs / "lost-metrics.jsonl", run.steps)
    observers: list[Observer] = [metrics]
    if config.progress:
        observers.append(Progress(console))
    if config.plot:
        observers.append(LossPlot(run.metrics, run.plot))
    if config.trackers:
        from launcher.tracking.trackers import Tracker  # a second of imports

        for name in config.trackers:
            observers.append(Tracker(name, config.project, run, console))
    return observers
