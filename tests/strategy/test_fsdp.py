"""How many ranks share one copy. That they do so: distributed/test_strategies.py."""

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
def test_of_two_nodes_with_two_ranks_so_many_share_a_copy(
    strategy: str, options: dict[str, int], size: int
) -> None:
    assert shard_size(STRATEGIES[strategy](name=strategy, **options), TWO_NODES) == size


@pytest.mark.parametrize(("size", "is_broken"), [("null", False), (3, False), (4, True)])
def test_hsdp_s_groups_may_be_any_part_of_all_ranks(size: object, is_broken: bool) -> None:
    """By default the ranks of a node; 3 of two nodes with 3 ranks each, and not 4."""
    config = composed(
        "strategy=hsdp", f"strategy.shard_size={size}", "training.global_batch_size=6"
    )
    broken = broken_rules(config, World(nodes=2, nproc_per_node=3))
    assert any("[hsdp-groups]" in line for line in broken) is is_broken
