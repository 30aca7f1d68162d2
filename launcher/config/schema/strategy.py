"""Schema of `strategy=`: how the train state is distributed over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from launcher.config.schema.setting import setting

OFFLOAD = (
    "keep parameters, gradients and moments in host memory and run the optimizer on the CPU; a "
    "layer is copied to the device while it computes"
)
OFFLOAD_OPTIMIZER = (
    "where master weights and moments are kept; with cpu the optimizer also runs there"
)
OFFLOAD_PARAM = "where a rank keeps its shard of the parameters between uses"


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """The base of all strategies."""

    name: str = setting(help="the strategy")

    @property
    def steps_on_cpu(self) -> bool:
        """Whether master weights, moments and the optimizer step are on the CPU."""
        return False

    @property
    def parameters_on_cpu(self) -> bool:
        """Whether parameters are in host memory between uses."""
        return False

    @property
    def on_disk(self) -> bool:
        """Whether parameters are on an NVMe disk between uses."""
        return False


@dataclass(kw_only=True, slots=True)
class AutoStrategyConfig(StrategyConfig):
    """single on one rank; ddp if the full state fits each device; otherwise hsdp if one of several
    nodes can hold it, or fsdp. The frozen configuration has what was chosen."""


@dataclass(kw_only=True, slots=True)
class SingleConfig(StrategyConfig):
    """One rank has the full state."""


@dataclass(kw_only=True, slots=True)
class DdpConfig(StrategyConfig):
    """Every rank has the full state; gradients are summed over the ranks."""


@dataclass(kw_only=True, slots=True)
class FsdpConfig(StrategyConfig):
    """Parameters, gradients and optimizer state are sharded over all ranks (FSDP2)."""

    reshard_after_forward: bool = setting(
        True, "free gathered layers after forward (less memory) or keep them (less communication)"
    )
    gradient_sync: str = setting(
        "auto",
        "reduce gradients after every micro-batch (always sharded) or after the last one of a step "
        "(less communication, unsharded gradients until then); auto: last if less than a tenth of "
        "the parameters is trained, otherwise every",
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
    """fsdp with `strategy.offload`, for models whose train state does not fit on the GPUs."""

    offload: bool = setting(True, OFFLOAD)


@dataclass(kw_only=True, slots=True)
class HsdpConfig(FsdpConfig):
    """The state is sharded within groups of ranks and replicated across the groups."""

    shard_size: int | None = setting(
        None, "ranks that share one copy; null: the ranks of one node", minimum=1
    )


@dataclass(kw_only=True, slots=True)
class ZeroConfig(StrategyConfig):
    """DeepSpeed ZeRO-1: the optimizer state is sharded."""

    reduce_bucket_size: int = setting(
        50_000_000, "gradient elements that are reduced in one message", minimum=1
    )
    extra: dict[str, Any] = setting(
        {}, "more keys for the DeepSpeed JSON, as DeepSpeed names them; contradictions are refused"
    )

    stage: ClassVar[int] = 1


@dataclass(kw_only=True, slots=True)
class Zero2Config(ZeroConfig):
    """DeepSpeed ZeRO-2: optimizer state and gradients are sharded."""

    overlap_comm: bool = setting(True, "reduce gradients during backward")
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
        50_000_000, "parameter elements that are gathered before they are used", minimum=0
    )
    persistence_threshold: int = setting(
        100_000,
        "tensors with at most this many elements are kept unsharded on every rank",
        minimum=0,
    )
    offload_param: str = setting("none", OFFLOAD_PARAM, choices=("none", "cpu", "nvme"))
    nvme_path: str | None = setting(
        None, "with offload_param=nvme: a folder on a local disk that no other run uses"
    )
    nvme_buffer_size: int = setting(
        100_000_000,
        "with offload_param=nvme: elements of the largest shard of a tensor on a rank; host memory "
        "contains five buffers of this size",
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
