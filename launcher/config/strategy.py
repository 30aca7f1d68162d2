"""Schema of `strategy=`: how state is spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(kw_only=True, slots=True)
class ZeroConfig(StrategyConfig):
    """DeepSpeed ZeRO-1: the optimizer state is sharded."""

    reduce_bucket_size: int = setting(
        50_000_000, "elements of gradient that are reduced in one message", minimum=1
    )
    extra: dict[str, Any] = setting(
        {}, "more keys for the DeepSpeed JSON, as DeepSpeed spells them; contradictions are refused"
    )

    @property
    def stage(self) -> int:
        return int(self.name.removeprefix("zero"))


@dataclass(kw_only=True, slots=True)
class Zero2Config(ZeroConfig):
    """DeepSpeed ZeRO-2: optimizer state and gradients are sharded."""

    overlap_comm: bool = setting(True, "reduce gradients while backward goes on")


@dataclass(kw_only=True, slots=True)
class Zero3Config(Zero2Config):
    """DeepSpeed ZeRO-3: parameters, gradients and optimizer state are sharded."""

    prefetch_bucket_size: int = setting(
        50_000_000, "elements of parameters that are gathered ahead of their use", minimum=0
    )
    persistence_threshold: int = setting(
        100_000, "tensors of up to so many elements are kept whole on every rank", minimum=0
    )


STRATEGIES: dict[str, type[StrategyConfig]] = {
    "single": SingleConfig,
    "ddp": DdpConfig,
    "fsdp": FsdpConfig,
    "hsdp": HsdpConfig,
    "zero1": ZeroConfig,
    "zero2": Zero2Config,
    "zero3": Zero3Config,
}
