"""Schema of `tracking=`: who watches. metrics.jsonl is always written."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    name: str = setting("local", "where metrics go besides metrics.jsonl")
    progress: bool = setting(True, "progress on the console of rank 0")
    plot: bool = setting(True, "draw loss.png")
