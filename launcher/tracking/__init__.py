"""The observers of a run: metrics.jsonl, the console, the plot and trackers. All on rank 0."""

from __future__ import annotations

from launcher.config.schema.tracking import TrackingConfig
from launcher.folders.run import RunDir
from launcher.run.rank_log import Console
from launcher.tracking.base import Observer
from launcher.tracking.console import ConsoleProgress
from launcher.tracking.jsonl import MetricsFile
from launcher.tracking.plot import LossPlot


def build_observers(config: TrackingConfig, run: RunDir, console: Console) -> list[Observer]:
    """The observers that `config` asks for; metrics.jsonl is always written."""
    metrics = MetricsFile(run.metrics, run.logs / "lost-metrics.jsonl", run.steps, console)
    observers: list[Observer] = [metrics]
    if config.progress:
        # A terminal gets a bar, its file plain lines.
        parts = (console.terminal, console.file) if console.isatty() else (console,)
        observers += [ConsoleProgress(part) for part in parts]
    if config.plot:
        observers.append(LossPlot(run.metrics, run.plot))
    if config.trackers:
        from launcher.tracking.trackers import Tracker  # takes a second to import

        for name in config.trackers:
            observers.append(Tracker(name, config.project, run, console))
    return observers
