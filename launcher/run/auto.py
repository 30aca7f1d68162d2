"""What `precision=auto` and `strategy=auto` become on the devices of the ranks. Imports no torch.

Where the command was typed, if the ranks will run there; otherwise by the ranks themselves
(launcher/training/choices.py), before they build anything. The frozen configuration then has
what was chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config import Config
from launcher.config.rules.rule import World
from launcher.config.rules.table import RULES, broken_rules
from launcher.config.schema.precision import PRECISIONS, PrecisionConfig
from launcher.config.schema.strategy import STRATEGIES, StrategyConfig
from launcher.run.footprint import Footprint, estimate

AUTO = "auto"
BF16_CAPABILITY = 8  # the first major compute capability that computes in bf16: Ampere
# The share of a device's memory that the estimate may fill: the rest is for CUDA's context, NCCL,
# kernels' workspaces and fragments, or for other processes of the host.
USABLE = 0.85
WORLD_RULES = tuple(r for r in RULES if r.id in ("single-is-one-rank", "hsdp-groups"))


@dataclass(frozen=True)
class Device:
    """What one rank computes on."""

    name: str
    is_gpu: bool
    has_bf16: bool  # a GPU that computes in it
    memory: int | None  # bytes: of the GPU, or the rank's share of the host's; None if unknown
    in_use: int = 0  # of these, by other processes

    @property
    def free(self) -> int:
        """Bytes that a rank can have; 0 if that is not known."""
        return 0 if self.memory is None else self.memory - self.in_use


def memory_in_use(total: int, free: int) -> int:
    """Bytes of a GPU that other processes hold; 0 if they are no more than CUDA itself needs, for
    which `USABLE` leaves room."""
    used = total - free
    return used if used > (1 - USABLE) * total else 0


@dataclass(frozen=True)
class Choice:
    """A configuration without auto, and the reason for each choice."""

    config: Config
    lines: list[str]

    def explain(self, problems: list[str]) -> list[str]:
        """`problems` of the configuration, and the reason for each choice that they speak of:
        nobody has typed it."""
        said = " ".join(problem.partition("→")[0] for problem in problems)
        chosen = {"precision": self.config.precision.name, "strategy": self.config.strategy.name}
        named = tuple(f"{key}=auto: " for key, name in chosen.items() if f"{key}={name}" in said)
        return [*problems, *(line for line in self.lines if line.startswith(named))]


def is_open(config: Config) -> bool:
    """Whether something is still to be chosen."""
    return AUTO in (config.precision.name, config.strategy.name)


def choose(
    config: Config,
    devices: Sequence[Device],
    world: World,
    model: Path | None,
    resumed: Config | None,
) -> Choice:
    """Choose what is auto in `config`, for ranks on `devices`.

    Args:
        model: The folder with config.json; None if it is not here.
        resumed: The configuration of the checkpoint that the run resumes from.
    """
    lines = []
    if config.precision.name == AUTO:
        precision, reason = _choose_precision(devices, resumed)
        config = dataclasses.replace(config, precision=precision)
        lines.append(f"precision=auto: {precision.name}, because {reason}")
    if config.strategy.name == AUTO:
        strategy, reason = _choose_strategy(config, devices, world, model, resumed)
        config = dataclasses.replace(config, strategy=strategy)
        lines.append(f"strategy=auto: {strategy.name}, because {reason}")
    return Choice(config, lines)


def _choose_precision(
    devices: Sequence[Device], resumed: Config | None
) -> tuple[PrecisionConfig, str]:
    if resumed is not None:
        return resumed.precision, "the checkpoint was trained in it"
    on_cpu = [device for device in devices if not device.is_gpu]
    if on_cpu:
        return _precision("fp32"), "the ranks run on CPU"
    older = [device for device in devices if not device.has_bf16]
    if older:
        return _precision("fp16"), (
            f"{older[0].name} does not compute in bf16; the loss is scaled "
            "→ precision=fp32 if it diverges"
        )
    return _precision("bf16"), f"{devices[0].name} computes in it"


def _precision(name: str) -> PrecisionConfig:
    return PRECISIONS[name](name=name)


def _strategy(name: str) -> StrategyConfig:
    return STRATEGIES[name](name=name)


def _choose_strategy(
    config: Config,
    devices: Sequence[Device],
    world: World,
    model: Path | None,
    resumed: Config | None,
) -> tuple[StrategyConfig, str]:
    footprint = None if model is None else estimate(config, model)
    too_large = _excess(config, footprint, devices)
    if resumed is not None:
        kept = dataclasses.replace(config, strategy=resumed.strategy)
        if not broken_rules(kept, world, WORLD_RULES):
            is_whole = resumed.strategy.name in ("single", "ddp")
            return resumed.strategy, f"the checkpoint was trained with it{too_large * is_whole}"
    if world.size == 1:
        return _strategy("single"), f"there is one rank{too_large}"
    if config.optimizer.name == "adafactor":
        return _strategy("ddp"), f"optimizer=adafactor needs complete tensors{too_large}"
    if footprint is None or not _least(devices).free:
        unknown = "the memory of a rank" if footprint else "the size of the model"
        return _strategy("fsdp"), f"{unknown} is not known"
    if not too_large:
        needed = _size(footprint.complete())
        return _strategy("ddp"), f"a complete train state needs about {needed} of {_room(devices)}"
    return _choose_sharded(config, footprint, devices, world)


def _least(devices: Sequence[Device]) -> Device:
    """The device with the least memory that a rank can have."""
    return min(devices, key=lambda device: device.free)


def _room(devices: Sequence[Device]) -> str:
    """The memory of the rank that has the least of it, as text."""
    device, sizes = _least(devices), {_size(each.memory or 0) for each in devices}
    text = f"every rank's {_size(device.memory or 0)}"
    if len(sizes) > 1:
        text = f"the {_size(device.memory or 0)} of {device.name}, the least of all ranks"
    return f"{text}, {_size(device.in_use)} of them in use already" if device.in_use else text


def _excess(config: Config, footprint: Footprint | None, devices: Sequence[Device]) -> str:
    """What to add if a rank cannot hold the complete train state; empty if it can, or if that is
    not known."""
    free = _least(devices).free
    if footprint is None or not free or footprint.complete() <= USABLE * free:
        return ""
    return (
        f", although a complete train state needs about {_size(footprint.complete())} of "
        f"{_room(devices)}{_ways_out(config)}"
    )


def _choose_sharded(
    config: Config, footprint: Footprint, devices: Sequence[Device], world: World
) -> tuple[StrategyConfig, str]:
    needed, usable = _size(footprint.complete()), USABLE * _least(devices).free
    too_large = f"a complete train state needs about {needed} of {_room(devices)}"
    per_node = world.nproc_per_node
    node = footprint.sharded(per_node)
    if world.nodes > 1 and per_node > 1 and node <= usable:
        return _strategy("hsdp"), f"{too_large}; divided by the ranks of a node, {_size(node)}"
    divided = footprint.sharded(world.size)
    reason = f"{too_large}; divided by {world.size} ranks, {_size(divided)}"
    if divided > usable:
        reason += f", which may not fit{_ways_out(config)}; shardway plan is exact"
    return _strategy("fsdp"), reason


def _ways_out(config: Config) -> str:
    """The overrides that need less memory and are not set yet, as text."""
    recomputes = config.training.activation_checkpointing == "full"
    overrides = {
        "training.activation_checkpointing=full": not recomputes,
        "method=qlora": config.method.name != "qlora",
        "strategy=fsdp_offload": config.optimizer.name not in ("adafactor", "adamw_paged"),
    }
    return f" → {', '.join([k for k, helps in overrides.items() if helps])} or more ranks"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def warn_about_fp32(config: Config, gpu: Device) -> str | None:
    """A line for the log if GPUs compute in fp32, which nearly always is a mistake."""
    if config.precision.name != "fp32" or config.training.tf32:
        return None
    faster = "bf16" if gpu.has_bf16 else "fp16"
    return (
        "slow: precision=fp32 on a GPU uses no tensor cores (67 instead of 989 TFLOP/s by the data "
        "sheet of an H100) and, for models with grouped heads, an attention kernel whose memory "
        f"grows with the square of the length → precision={faster}, or training.tf32=true"
    )


def unused_levers(config: Config) -> str | None:
    """A line for the log of a run on GPUs: what would make it faster and is off, with the
    override."""
    training, strategy = config.training, config.strategy.name
    levers = {
        "data.packing=true": not config.data.packing,
        "training.kernels=liger": training.kernels == "torch" and training.compile == "off",
        "training.compile=auto": training.compile == "off"
        and training.kernels == "torch"
        and not strategy.startswith("zero"),
        "training.activation_checkpointing=off (if the memory is enough)": (
            training.activation_checkpointing != "off"
        ),
    }
    off = [override for override, is_unused in levers.items() if is_unused]
    return f"off, and often faster when on: {', '.join(off)}" if off else None
