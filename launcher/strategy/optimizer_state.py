"""The state of an optimizer as shards: the moments of each weight, and its step counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from launcher.distributed.shards import Shard, shard_of

# Keys in the state of a bitsandbytes 8-bit optimizer: the scales of the blocks of a moment, and the
# values of the 256 codes, which all parameters share.
BLOCK_SCALES = ("absmax1", "absmax2")
CODEBOOKS = ("qmap1", "qmap2")
BLOCK_SIZE = 256


def get_or_create_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]
) -> list[dict[str, Any]]:
    """The optimizer's state of each parameter. Missing state is created with its initial values.

    The state is created by a step with zero gradients and a learning rate of zero, which changes no
    weight, as in torch.distributed.checkpoint.state_dict.
    """
    parameters = list(parameters)
    without_state = [parameter for parameter in parameters if not optimizer.state.get(parameter)]
    if without_state:
        learning_rates = [group["lr"] for group in optimizer.param_groups]
        # Under offload, DeepSpeed keeps its own buffers here.
        gradients = [parameter.grad for parameter in without_state]
        for parameter in without_state:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate
        for parameter, gradient in zip(without_state, gradients, strict=True):
            parameter.grad = gradient
            for key, value in optimizer.state[parameter].items():
                if torch.is_tensor(value) and key not in CODEBOOKS:
                    value.zero_()
                elif key == "step":
                    optimizer.state[parameter]["step"] = 0
    for parameter in parameters:  # a checkpoint is loaded into tensors, so the count must be one
        state = optimizer.state[parameter]
        if "step" in state and not torch.is_tensor(state["step"]):
            state["step"] = torch.tensor(float(state["step"]))
    return [optimizer.state[parameter] for parameter in parameters]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All tensors in the optimizer's state."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


def split_state(
    weights: dict[str, Shard], states: Iterable[dict[str, Any]], num_shards: int
) -> tuple[dict[str, dict[str, Shard]], dict[str, dict[str, torch.Tensor]]]:
    """(moments, step counts) of the optimizer's `states`, one state for each of `weights`.

    A 0-d tensor is a step count. A tensor with as many elements as the shard of the weight is a
    moment of the same part. Other tensors are the block scales of quantized moments, which
    are split into `num_shards` like their weight, or complete on every rank (the rows and columns
    of adafactor).
    """
    moments: dict[str, dict[str, Shard]] = {}
    step_counts: dict[str, dict[str, torch.Tensor]] = {}
    for (name, weight), state in zip(weights.items(), states, strict=True):
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
        for key, value in tensors.items():
            if value.ndim and key not in CODEBOOKS:
                shard = _moment_shard(key, value.detach(), weight, num_shards)
                moments.setdefault(key, {})[name] = shard
        step_counts[name] = {key: value for key, value in tensors.items() if value.ndim == 0}
    return moments, step_counts


def _moment_shard(key: str, value: torch.Tensor, weight: Shard, num_shards: int) -> Shard:
    if key in BLOCK_SCALES:
        return _block_scales(value.view(-1), weight, num_shards)
    if value.numel() == weight.local.numel():
        return replace(weight, local=value.view(-1))
    return shard_of(value)


def _block_scales(value: torch.Tensor, weight: Shard, num_shards: int) -> Shard:
    """The scales of the blocks of this rank's shard, in those of all shards: one after another, or
    as rows of equal length if the weight is not split by rows. A checkpoint of the other split has
    another shape, and is refused."""
    rows, row = weight.shape[weight.dim], math.prod(weight.shape[weight.dim + 1 :])
    rows_of_shard = -(-rows // num_shards)  # except in the last shards
    number = weight.begin // (rows_of_shard * row)
    blocks = [
        -(-min(rows_of_shard, rows - first) * row * weight.blocks // BLOCK_SIZE)
        for first in range(0, rows, rows_of_shard)
    ]
    if weight.dim:
        return Shard(value, number * blocks[0], (num_shards, blocks[0]))
    return Shard(value, sum(blocks[:number]), (sum(blocks),))
