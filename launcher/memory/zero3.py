"""What zero3 keeps gathered, from DeepSpeed's settings: how many layers a short trace must have.

DeepSpeed keeps a weight after its forward if fewer than `stage3_max_reuse_distance` elements are
used before its next use, in the backward (partitioned_param_coordinator.py). Between the two are
the layers behind it, and the head, each of them twice. So the last layers of a model stay gathered,
or all of them if it is small enough; further layers in front change nothing.

It gathers `strategy.prefetch_bucket_size` elements ahead. How many that are depends on where a
bucket ends: traces run without, and the bucket is added.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from launcher.config import Config
from launcher.config.deepspeed import engine_config
from launcher.config.schema.precision import PrecisionConfig
from launcher.config.schema.strategy import Zero3Config
from launcher.model.layers import decoder_layers


def without_prefetch(config: Config) -> tuple[Config, int]:
    """`config` without zero3's prefetching, and the elements that it gathers ahead."""
    strategy = config.strategy
    if not isinstance(strategy, Zero3Config):
        return config, 0
    simple = dataclasses.replace(strategy, prefetch_bucket_size=0)
    return dataclasses.replace(config, strategy=simple), strategy.prefetch_bucket_size


def keeps_all_gathered(model: nn.Module, config: Config) -> bool:
    """Whether zero3 keeps every weight of `model` from forward to backward."""
    distance = _reuse_distance(config)
    return distance is not None and 2 * _elements(model) < distance


def layers_kept_gathered(model: nn.Module, config: Config) -> int:
    """How many of the last layers of `model` stay gathered from forward to backward; 0 also if all
    do, because every layer then adds the same."""
    distance = _reuse_distance(config)
    if distance is None or 2 * _elements(model) < distance:
        return 0
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    behind = 2 * (0 if head is None else _elements(head))
    return max(0, -(-(distance - behind) // (2 * _elements(decoder_layers(model)[-1]))))


def _reuse_distance(config: Config) -> int | None:
    """Elements; None if the strategy is not zero3."""
    if not isinstance(config.strategy, Zero3Config):
        return None
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    precision = PrecisionConfig(name="bf16")  # of no importance here
    zero = engine_config(config.strategy, config.training, precision, 1)["zero_optimization"]
    return int(DeepSpeedZeroConfig(**zero).max_reuse_distance)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
