"""Schema of `tracking=`: where metrics are reported. metrics.jsonl is always written."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.setting import setting

TRACKERS = ("tensorboard", "wandb", "mlflow")  # each is also the name of its package


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics are reported besides metrics.jsonl."""

    name: str = setting("local", "name of the tracking configuration")
    progress: bool = setting(True, "show progress on the console of rank 0")
    plot: bool = setting(True, "draw loss.png")
    trackers: list[str] = setting([], "trackers that also receive the metrics", choices=TRACKERS)
    project: str = setting("shardway", "project of wandb, experiment of mlflow")
    peak_tflops: float | None = setting(
        None,
        "dense peak TFLOP/s of one device in the compute dtype, for mfu; null: looked up by the "
        "name of the device",
        above=0,
    )
