"""What a rule between settings is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.config import Config


@dataclass(frozen=True)
class World:
    """What is known of the ranks before they start."""

    nodes: int
    nproc_per_node: int
    gpus: int  # visible on this machine; 0 where ranks run on CPU
    rank: int = 0  # of the asking process, where torchrun started it

    @property
    def size(self) -> int:
        return self.nodes * self.nproc_per_node


@dataclass(frozen=True)
class Rule:
    id: str
    about: str  # what it asks, for `shardway rules` and the reference
    broken: Callable[[Config, World], bool]
    sentence: Callable[[Config, World], str]
    fix: Callable[[Config, World], str]
