"""Schema of `tracking=`: who watches. metrics.jsonl is always written."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting

TRACKERS = ("tensorboard", "wandb", "mlflow")  # each the name of its package


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    name: str = setting("local", "where metrics go besides metrics.jsonl")
    progress: bool = setting(True, "progress on the console of rank 0")
    plot: bool = setting(True, "draw loss.png")
    trackers: list[str] = setting([], "who is told besides metrics.jsonl", choices=TRACKERS)
    project: str = setting("shardway", "the project of wandb, the experiment of mlflow")
    peak_tflops: float | None = setting(
        None,
        "dense TFLOP/s of one device in the compute dtype, for mfu; null: known by its name",
        above=0,
    )
