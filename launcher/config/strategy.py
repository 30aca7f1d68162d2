"""Schema of `strategy=`: how state is spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    name: str = setting(help="the strategy")


@dataclass(kw_only=True, slots=True)
class SingleConfig(StrategyConfig):
    """One rank holds everything."""


@dataclass(kw_only=True, slots=True)
class DdpConfig(StrategyConfig):
    """Every rank holds everything; gradients are summed."""


@dataclass(kw_only=True, slots=True)
class FsdpConfig(StrategyConfig):
    """Parameters, gradients and optimizer state are sharded over all ranks (FSDP2)."""

    reshard_after_forward: bool = setting(
        True, "free gathered layers after forward (less memory) or keep them (less traffic)"
    )
    gradient_sync: str = setting(
        "auto",
        "reduce gradients after every micro-batch (sharded at all times) or after the last one of "
        "a step (less traffic, whole gradients in between); auto is last where less than a tenth "
        "of the parameters is trained, else every",
        choices=("auto", "every", "last"),
    )


@dataclass(kw_only=True, slots=True)
class HsdpConfig(FsdpConfig):
    """Sharded inside groups of ranks, replicated between the groups."""

    shard_size: int | None = setting(
        None, "ranks that share one copy; null is the ranks of one node", minimum=1
    )


STRATEGIES: dict[str, type[StrategyConfig]] = {
    "single": SingleConfig,
    "ddp": DdpConfig,
    "fsdp": FsdpConfig,
    "hsdp": HsdpConfig,
}
