"""The part of the trained state that a rank holds."""

from __future__ import annotations

from typing import Any

import torch

from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import local_part
from tests.helpers import parts
from tests.helpers.parts import Case


def held_bytes(rank_info: RankInfo, case: Case, shards: int = 1) -> dict[str, int]:
    """Bytes of parameters, and of the optimizer's moments after one step, that this rank holds; and
    the maximum that a rank may hold of a model of `shards` shards."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy: Any = train_state.strategy
    parts.train_step(strategy, loader.step_batch(0))
    parameters = [local_part(p) for p in strategy.model.parameters()]
    states = [
        local_part(value)
        for state in strategy.optimizer.state.values()
        for key, value in state.items()
        if key in ("exp_avg", "exp_avg_sq")
    ]
    trained = [p for p in strategy.model.parameters() if p.requires_grad]
    return {
        "parameters": _bytes(parameters),
        "moments": _bytes(states),
        "promised parameters": _share(list(strategy.model.parameters()), shards),
        "promised moments": 2 * _share(trained, shards),
    }


def zero_elements(rank_info: RankInfo, case: Case) -> dict[str, int]:
    """Elements that this rank holds under ZeRO after one step, and those of the full model."""
    train_state, loader = parts.set_up(rank_info, case)
    strategy: Any = train_state.strategy
    parts.train_step(strategy, loader.step_batch(0))
    state = strategy.state()
    moments = [shard.local for each in state.moments.values() for shard in each.values()]
    parameters = list(strategy.model.parameters())
    partitions = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    return {
        "masters": sum(shard.local.numel() for shard in state.weights.values()),
        "moments": sum(moment.numel() for moment in moments),
        "flat": sum(flat.numel() for flat in strategy._flat_masters),
        "whole": sum(parameter.data.numel() for parameter in parameters),
        "partitions": sum(partition.numel() for partition in partitions),
    }


def _share(tensors: list[torch.Tensor], shards: int) -> int:
    """Bytes of the largest share if rows are split into equal ranges: ⌈rows / shards⌉ of each."""
    return sum(
        -(-t.shape[0] // shards) * (t.numel() // t.shape[0]) * t.element_size() for t in tensors
    )


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
