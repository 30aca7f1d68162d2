"""A rule between settings, and the facts that it can check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.config import Config
from launcher.config.schema.cluster import SlurmConfig


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is installed where the ranks run, as far as known before they start."""

    gpus: int = 0  # visible GPUs; 0: ranks run on CPU
    flash_attention: bool = False  # the package flash-attn
    libaio: bool = True  # the library and headers for DeepSpeed's disk access
    missing_trackers: tuple[str, ...] = ()  # requested but not installed
    compiler: bool = True  # for C++
    liger: bool = False  # the packages liger-kernel and triton
    triton_interpreter: bool = False  # Triton kernels run on CPU, slowly


@dataclass(frozen=True)
class World:
    """The ranks of a run before they start."""

    nodes: int
    nproc_per_node: int
    machine: Machine = Machine()
    rank: int = 0  # of this process, if torchrun started it

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.nodes * self.nproc_per_node

    @property
    def gpus(self) -> int:
        """GPUs per node; 0: ranks run on CPU."""
        return self.machine.gpus

    @classmethod
    def from_config(cls, config: Config, machine: Machine) -> World:
        """The ranks that `config` asks for when it is launched from `machine`."""
        cluster = config.cluster
        if isinstance(cluster, SlurmConfig):  # the ranks run on other machines
            machine = dataclasses.replace(machine, gpus=cluster.gpus_per_node)
        default = 1 if config.strategy.name == "single" else machine.gpus or cluster.cpu_processes
        return cls(cluster.nodes, cluster.nproc_per_node or default, machine)


@dataclass(frozen=True)
class Example:
    """Overrides that break a rule, as typed, and the machine on which they break it."""

    overrides: str
    machine: Machine | None = None  # None: any machine, such as one without GPUs
    files: dict[str, str] = field(default_factory=dict)  # path → content of files that must exist

    def world(self, config: Config) -> World:
        """The ranks of `config`, composed from the overrides, on the machine of the example."""
        machine = self.machine or Machine()
        missing = tuple(t for t in config.tracking.trackers if t in machine.missing_trackers)
        return World.from_config(config, dataclasses.replace(machine, missing_trackers=missing))

    def describe_machine(self) -> str:
        """Text such as `with 2 GPUs and flash-attn`; empty if the machine does not matter."""
        machine = self.machine
        if machine is None:
            return ""
        if not machine.libaio:
            return "without libaio"
        if machine.missing_trackers:
            return f"without {' and '.join(machine.missing_trackers)}"
        if not machine.compiler:
            return "without a GPU or a C++ compiler"
        if machine.gpus == 0:
            return "without a GPU"
        gpus = "with a GPU" if machine.gpus == 1 else f"with {machine.gpus} GPUs"
        packages = {"flash-attn": machine.flash_attention, "liger-kernel": machine.liger}
        return " and ".join([gpus, *(name for name, installed in packages.items() if installed)])


@dataclass(frozen=True)
class Rule:
    """A condition between settings, checked before anything starts."""

    id: str
    requirement: str  # what the rule requires, for `shardway rules` and the reference
    broken: Callable[[Config, World], bool]
    message: Callable[[Config, World], str]  # names the settings and their values
    # The overrides that fix it, then alternatives after ", or"; plain text if no override can.
    fix: Callable[[Config, World], str]
    example: Example
