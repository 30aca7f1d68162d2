"""The number of ranks that share one copy. See also distributed/test_strategies.py."""

from __future__ import annotations

import pytest

from launcher.config.rules.rule import World
from launcher.config.rules.table import broken_rules
from launcher.config.schema.strategy import STRATEGIES
from launcher.distributed.process_group import RankInfo
from launcher.strategy.fsdp import shard_size
from tests.helpers.compose import composed
from tests.helpers.parts import CPU

TWO_NODES = RankInfo(rank=2, local_rank=0, world_size=4, local_world_size=2, device=CPU)


@pytest.mark.parametrize(
    ("strategy", "options", "size"),
    [
        ("single", {}, 1),
        ("ddp", {}, 1),
        ("fsdp", {}, 4),
        ("hsdp", {}, 2),  # the ranks of a node
        ("hsdp", {"shard_size": 1}, 1),
        ("hsdp", {"shard_size": 4}, 4),
    ],
)
def test_ranks_per_copy_on_two_nodes_with_two_ranks(
    strategy: str, options: dict[str, int], size: int
) -> None:
    assert shard_size(STRATEGIES[strategy](name=strategy, **options), TWO_NODES) == size


@pytest.mark.parametrize(("size", "is_broken"), [("null", False), (3, False), (4, True)])
def test_hsdp_group_size_must_divide_the_world_size(size: object, is_broken: bool) -> None:
    """The default is a node's ranks. On two nodes with 3 ranks each, 3 is allowed and 4 is not."""
    config = composed(
        "strategy=hsdp", f"strategy.shard_size={size}", "training.global_batch_size=6"
    )
    broken = broken_rules(config, World(nodes=2, nproc_per_node=3))
    assert any("[hsdp-groups]" in line for line in broken) is is_broken
