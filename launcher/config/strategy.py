"""Schema of `strategy=`: how state is spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from launcher.config.setting import setting

OFFLOAD = (
    "keep parameters, gradients and moments in host memory, where the optimizer steps; a layer is "
    "copied to the device while it computes"
)
OFFLOAD_OPTIMIZER = "where masters and moments are kept; under cpu the optimizer steps there"
OFFLOAD_PARAM = "where a rank keeps its part of the parameters between their uses"


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    name: str = setting(help="the strategy")

    @property
    def steps_on_cpu(self) -> bool:
        """Whether masters and moments are in host memory, and the optimizer steps there."""
        return False

    @property
    def parameters_on_cpu(self) -> bool:
        """Whether parameters are in host memory between their uses."""
        return False

    @property
    def on_disk(self) -> bool:
        """Whether parameters are on an NVMe disk between their uses."""
        return False


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
    offload: bool = setting(False, OFFLOAD)

    @property
    def steps_on_cpu(self) -> bool:
        return self.offload

    @property
    def parameters_on_cpu(self) -> bool:
        return self.offload


@dataclass(kw_only=True, slots=True)
class FsdpOffloadConfig(FsdpConfig):
    """fsdp with `strategy.offload`: the state of a model that does not fit the GPUs."""

    offload: bool = setting(True, OFFLOAD)


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

    stage: ClassVar[int] = 1


@dataclass(kw_only=True, slots=True)
class Zero2Config(ZeroConfig):
    """DeepSpeed ZeRO-2: optimizer state and gradients are sharded."""

    overlap_comm: bool = setting(True, "reduce gradients while backward goes on")
    offload_optimizer: str = setting("none", OFFLOAD_OPTIMIZER, choices=("none", "cpu"))

    stage: ClassVar[int] = 2

    @property
    def steps_on_cpu(self) -> bool:
        return self.offload_optimizer == "cpu"


@dataclass(kw_only=True, slots=True)
class Zero2OffloadConfig(Zero2Config):
    """zero2 with `strategy.offload_optimizer=cpu`."""

    offload_optimizer: str = setting("cpu", OFFLOAD_OPTIMIZER, choices=("none", "cpu"))


@dataclass(kw_only=True, slots=True)
class Zero3Config(Zero2Config):
    """DeepSpeed ZeRO-3: parameters, gradients and optimizer state are sharded."""

    prefetch_bucket_size: int = setting(
        50_000_000, "elements of parameters that are gathered ahead of their use", minimum=0
    )
    persistence_threshold: int = setting(
        100_000, "tensors of up to so many elements are kept whole on every rank", minimum=0
    )
    offload_param: str = setting("none", OFFLOAD_PARAM, choices=("none", "cpu", "nvme"))
    nvme_path: str | None = setting(
        None, "of offload_param=nvme: a folder on a local disk that no other run uses"
    )
    nvme_buffer_size: int = setting(
        100_000_000,
        "of offload_param=nvme: elements of the largest part of a tensor that a rank keeps; five "
        "buffers of this size are in host memory",
        minimum=1,
    )

    stage: ClassVar[int] = 3

    @property
    def parameters_on_cpu(self) -> bool:
        return self.offload_param == "cpu"

    @property
    def on_disk(self) -> bool:
        return self.offload_param == "nvme"


@dataclass(kw_only=True, slots=True)
class Zero3OffloadConfig(Zero3Config):
    """zero3 with `strategy.offload_optimizer=cpu` and `strategy.offload_param=cpu`."""

    offload_optimizer: str = setting("cpu", OFFLOAD_OPTIMIZER, choices=("none", "cpu"))
    offload_param: str = setting("cpu", OFFLOAD_PARAM, choices=("none", "cpu", "nvme"))


STRATEGIES: dict[str, type[StrategyConfig]] = {
    "single": SingleConfig,
    "ddp": DdpConfig,
    "fsdp": FsdpConfig,
    "fsdp_offload": FsdpOffloadConfig,
    "hsdp": HsdpConfig,
    "zero1": ZeroConfig,
    "zero2": Zero2Config,
    "zero2_offload": Zero2OffloadConfig,
    "zero3": Zero3Config,
    "zero3_offload": Zero3OffloadConfig,
}
