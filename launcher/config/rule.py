"""What a rule between settings is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.config import Config
from launcher.config.cluster import SlurmConfig


@dataclass(frozen=True)
class World:
    """What is known of the ranks before they start."""

    nodes: int
    nproc_per_node: int
    gpus: int  # visible on this machine; 0 where ranks run on CPU
    rank: int = 0  # of the asking process, where torchrun started it
    flash_attention: bool = False  # the package flash-attn is installed on this machine
    libaio: bool = True  # it can be built against on this machine
    missing: tuple[str, ...] = ()  # trackers that are asked for and not installed here
    compiler: bool = True  # of C++, is on this machine
    liger: bool = False  # the packages liger-kernel and triton are installed on this machine
    interpreter: bool = False  # Triton's: kernels run on CPU, slowly

    @property
    def size(self) -> int:
        return self.nodes * self.nproc_per_node

    @classmethod
    def of(
        cls,
        config: Config,
        gpus: int,
        flash_attention: bool = False,
        libaio: bool = True,
        missing: tuple[str, ...] = (),
        compiler: bool = True,
        liger: bool = False,
        interpreter: bool = False,
    ) -> World:
        """The ranks that `config` asks for on a machine with so many GPUs."""
        cluster = config.cluster
        if isinstance(cluster, SlurmConfig):  # this machine is not where the ranks will be
            gpus = cluster.gpus_per_node
        automatic = 1 if config.strategy.name == "single" else gpus or cluster.cpu_processes
        per_node = cluster.nproc_per_node or automatic
        machine = (flash_attention, libaio, missing, compiler, liger, interpreter)
        return cls(cluster.nodes, per_node, gpus, 0, *machine)


@dataclass(frozen=True)
class Example:
    """Overrides that break a rule, as typed, and the machine on which they do."""

    overrides: str
    gpus: int | None = None  # None: as many as there are, or none
    flash_attention: bool = False
    libaio: bool = True
    missing: tuple[str, ...] = ()
    compiler: bool = True
    liger: bool = False
    files: dict[str, str] = field(default_factory=dict)  # path → content, that must be there

    def world(self, config: Config) -> World:
        missing = tuple(name for name in config.tracking.trackers if name in self.missing)
        machine = (self.flash_attention, self.libaio, missing, self.compiler, self.liger)
        return World.of(config, self.gpus or 0, *machine)

    def machine(self) -> str:
        """In words; empty where any will do."""
        if not self.libaio:
            return "without libaio"
        if self.missing:
            return f"without {' and '.join(self.missing)}"
        if not self.compiler:
            return "without a GPU and a C++ compiler"
        if self.gpus is None:
            return ""
        if self.gpus == 0:
            return "without a GPU"
        gpus = "with a GPU" if self.gpus == 1 else f"with {self.gpus} GPUs"
        installed = {"flash-attn": self.flash_attention, "liger-kernel": self.liger}
        return " and ".join([gpus, *(name for name, there in installed.items() if there)])


@dataclass(frozen=True)
class Rule:
    id: str
    about: str  # what it asks, for `shardway rules` and the reference
    broken: Callable[[Config, World], bool]
    sentence: Callable[[Config, World], str]
    # Overrides that mend it, then what else does after ", or"; words where no override can.
    fix: Callable[[Config, World], str]
    example: Example
