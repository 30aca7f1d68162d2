"""How fast a run would be: a roofline of the GPU, of its memory and of the network.

Imports no torch. docs/memory.md has the formula, and what it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.cluster.gpu_specs import GB, GpuSpec
from launcher.config import Config
from launcher.config.rules.rule import World
from launcher.config.schema.strategy import FsdpConfig, HsdpConfig, Zero3Config, ZeroConfig
from launcher.memory.estimate import Amounts

# Shares of a data sheet's numbers that large operations reach.
REACHED_FLOPS, REACHED_BANDWIDTH, REACHED_NETWORK = 0.65, 0.8, 0.7
LAUNCH_SECONDS = 10e-6  # of a kernel, on the host
TRAFFIC = 2  # each result is written once and read once
# With offload: GB/s of a GPU's PCIe bus, and of the memory of a machine, which its ranks share.
HOST_LINK, HOST_MEMORY = 25.0, 200.0


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Estimated seconds of an optimizer step. The GPU and the network work at the same time."""

    compute: float  # of the GPU, or of the host if that is slower to launch the kernels
    network: float
    optimizer: float

    @property
    def total(self) -> float:
        return max(self.compute, self.network) + self.optimizer


def step_time(config: Config, world: World, amounts: Amounts, gpu: GpuSpec) -> StepTime:
    """The time of a step of `config` on GPUs of this kind; `amounts` of one micro-batch."""
    rows = world.size * config.training.micro_batch_size
    micro_batches = max(1, config.training.global_batch_size // rows)
    math = amounts["flops"] / (gpu.half * 1e12 * REACHED_FLOPS)
    memory = TRAFFIC * amounts["written"] / (gpu.bandwidth * GB * REACHED_BANDWIDTH)
    launches = amounts["kernels"] * LAUNCH_SECONDS
    each, once = _message_seconds(config, world, amounts, gpu)
    return StepTime(
        compute=micro_batches * max(math + memory, launches),
        network=micro_batches * each + once,
        optimizer=_optimizer_seconds(config, world, amounts, gpu),
    )


def _message_seconds(
    config: Config, world: World, amounts: Amounts, gpu: GpuSpec
) -> tuple[float, float]:
    """Seconds of the messages of each micro-batch, and of those that a step sends once."""
    strategy, ranks = config.strategy, world.size
    gradient = amounts["trained"] * (2 if config.precision.name == "pure_bf16" else 4)
    weights, trained_weights = amounts["working"], 2 * amounts["trained"]
    if isinstance(strategy, ZeroConfig):
        reduce = _ring_seconds(gradient, ranks, world, gpu)
        if isinstance(strategy, Zero3Config):
            each = 2 * _ring_seconds(weights, ranks, world, gpu) + reduce
            return each + _copy_seconds(strategy.parameters_on_cpu, weights, ranks), 0.0
        gather = _ring_seconds(trained_weights, ranks, world, gpu)
        return (0.0, reduce + gather) if strategy.stage == 1 else (reduce, gather)
    if not isinstance(strategy, FsdpConfig):  # single, ddp
        return 0.0, 2 * _ring_seconds(gradient, ranks, world, gpu)
    shards = _shards(strategy, world)
    gathers = 2 if strategy.reshard_after_forward else 1
    each = gathers * _ring_seconds(weights, shards, world, gpu)
    each += _copy_seconds(strategy.offload, weights, shards)
    reduce = _ring_seconds(gradient, shards, world, gpu)
    replicas = ranks // shards
    across = 2 * gradient / shards * (1 - 1 / replicas) / (gpu.network * GB * REACHED_NETWORK)
    if strategy.gradient_sync == "every" or (
        strategy.gradient_sync == "auto" and 10 * amounts["trained"] >= amounts["elements"]
    ):
        return each + reduce, across
    return each, reduce + across


def _shards(strategy: FsdpConfig, world: World) -> int:
    """The number of ranks that share one copy."""
    if isinstance(strategy, HsdpConfig):
        return strategy.shard_size or world.nproc_per_node
    return world.size


def _ring_seconds(size: float, ranks: int, world: World, gpu: GpuSpec) -> float:
    """Seconds to gather, or to reduce and scatter, `size` bytes in a group of neighbors. Between
    machines, all of a machine's GPUs use their network at once."""
    speed = gpu.link
    if ranks > world.nproc_per_node:
        speed = min(gpu.link, world.nproc_per_node * gpu.network)
    return size * (1 - 1 / ranks) / (speed * GB * REACHED_NETWORK)


def _copy_seconds(offloaded: bool, size: float, shards: int) -> float:
    """Seconds to copy a shard to the GPU, in forward and in backward."""
    return 2 * size / shards / (HOST_LINK * GB) if offloaded else 0.0


def _optimizer_seconds(config: Config, world: World, amounts: Amounts, gpu: GpuSpec) -> float:
    """Seconds to read and write the state that this rank steps: masters and moments twice, and the
    gradient."""
    strategy, gradient = config.strategy, amounts["trained"] * 4
    if isinstance(strategy, ZeroConfig):
        gradient /= world.size
    elif isinstance(strategy, FsdpConfig):
        gradient /= _shards(strategy, world)
    size = 2 * (amounts["optimizer"] + gradient) + gradient
    if not strategy.steps_on_cpu:
        return size / (gpu.bandwidth * GB * REACHED_BANDWIDTH)
    copies = 2 * gradient / (HOST_LINK * GB)  # gradients down, weights up
    return copies + size * world.nproc_per_node / (HOST_MEMORY * GB)
