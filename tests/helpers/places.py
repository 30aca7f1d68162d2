"""Where the ranks of a test run: on CPU, or with a GPU each. One body of a test serves both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from launcher.config import Config
from launcher.config.rules.rule import Machine, World
from launcher.config.rules.table import broken_rules


@dataclass(frozen=True)
class Place:
    device: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.device}-{self.ranks}"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def options(self, strategy: str) -> dict[str, int]:
        """Options of a strategy with which it shards a tiny model on these ranks."""
        if strategy == "hsdp":
            return {"shard_size": self.ranks}
        return {"persistence_threshold": 0} if strategy.startswith("zero3") else {}

    def refusals(self, config: Config) -> list[str]:
        """The rules that `config` breaks here, if every package is installed."""
        gpus = self.ranks if self.on_gpu else 0
        machine = Machine(gpus=gpus, flash_attention=True, liger=True)
        return broken_rules(config, World(1, self.ranks, machine))

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        more = [pytest.mark.multi_gpu] if self.ranks > 1 else []
        return [pytest.mark.gpu, *more] if self.on_gpu else []


CPU, GPU, TWO_GPUS = Place("cpu", 1), Place("cuda", 1), Place("cuda", 2)


def placed(
    cells: Iterable[Any], on_cpu: Sequence[Any] = (), sharded: Sequence[Any] | None = None
) -> list[Any]:
    """Parameters (place, cell): every cell on one GPU, those of `sharded` (None: all) on two GPUs,
    and those of `on_cpu` on a CPU rank, where they test the test."""
    cells = list(cells)
    two = cells if sharded is None else sharded
    pairs = [
        *((CPU, cell) for cell in on_cpu),
        *((GPU, cell) for cell in cells),
        *((TWO_GPUS, cell) for cell in two),
    ]
    return [pytest.param(at, cell, marks=at.marks, id=f"{at}-{_name(cell)}") for at, cell in pairs]


def _name(cell: Any) -> str:
    return "-".join(map(str, cell)) if type(cell) is tuple else str(cell)
