"""The rules of `tracking=`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.rule import Example, Rule, World


def _installed(config: Config, world: World) -> list[str]:
    return [name for name in config.tracking.trackers if name not in world.missing]


TRACKING_RULES: tuple[Rule, ...] = (
    Rule(
        "trackers-are-installed",
        "the packages of tracking.trackers are installed",
        lambda c, w: bool(w.missing),
        lambda c, w: (
            f"tracking.trackers=[{','.join(c.tracking.trackers)}] names {' and '.join(w.missing)}, "
            "which is not installed"
        ),
        lambda c, w: (
            f"tracking.trackers=[{','.join(_installed(c, w))}], "
            f"or pip install 'shardway[{','.join(w.missing)}]'"
        ),
        Example("tracking.trackers=[wandb]", missing=("wandb",)),
    ),
)
