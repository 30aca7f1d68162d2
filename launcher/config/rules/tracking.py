"""The rules of `tracking=`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.rules.rule import Example, Machine, Rule, World


def _installed_trackers(config: Config, world: World) -> list[str]:
    return [name for name in config.tracking.trackers if name not in world.machine.missing_trackers]


TRACKING_RULES: tuple[Rule, ...] = (
    Rule(
        "trackers-are-installed",
        "the packages of tracking.trackers are installed",
        lambda c, w: bool(w.machine.missing_trackers),
        lambda c, w: (
            f"tracking.trackers=[{','.join(c.tracking.trackers)}]: not installed: "
            f"{', '.join(w.machine.missing_trackers)}"
        ),
        lambda c, w: (
            f"tracking.trackers=[{','.join(_installed_trackers(c, w))}], "
            f"or pip install 'shardway[{','.join(w.machine.missing_trackers)}]'"
        ),
        Example("tracking.trackers=[wandb]", Machine(missing_trackers=("wandb",))),
    ),
)
