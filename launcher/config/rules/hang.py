"""The rule of `cluster.hang_seconds`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.rules.rule import Example, Rule, World
from launcher.config.schema.cluster import hang_seconds


def _is_unreadable(config: Config, world: World) -> bool:
    try:
        hang_seconds(config.cluster)
    except ValueError:
        return True
    return False


HANG_RULES: tuple[Rule, ...] = (
    Rule(
        "hang-seconds",
        "cluster.hang_seconds is auto, a number of seconds, or 0",
        _is_unreadable,
        lambda c, w: (
            f"cluster.hang_seconds={c.cluster.hang_seconds} is not auto and no number of seconds"
        ),
        lambda c, w: "cluster.hang_seconds=auto",
        Example("cluster.hang_seconds=5m"),
    ),
)
