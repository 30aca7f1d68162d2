"""What DeepSpeed keeps, from its settings: how many layers a short trace must have.

zero3 keeps a weight after its forward if fewer than `stage3_max_reuse_distance` elements are
used before its next use, in the backward (partitioned_param_coordinator.py). Between the two are
the layers behind it, and the head, each of them twice. So the last layers of a model stay gathered,
or all of them if it is small enough; further layers in front change nothing.

With `strategy.prefetch_bucket_size` zero3 gathers at least one weight ahead whenever a module is
called, also one without weights, up to `stage3_max_live_parameters` elements: a lead that grows
over several layers, more than a trace has. So traces run without, and count what would be gathered
on top of what is.

Every stage collects gradients in a bucket of `strategy.reduce_bucket_size` elements: until it is
full for the first time, they take more memory with each layer, and then no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from launcher.config import Config
from launcher.config.deepspeed import engine_config
from launcher.config.schema.precision import PrecisionConfig
from launcher.config.schema.strategy import Zero3Config, ZeroConfig
from launcher.model.layers import decoder_layers


def without_prefetch(config: Config) -> Config:
    """`config` without zero3's prefetching."""
    strategy = config.strategy
    if not isinstance(strategy, Zero3Config):
        return config
    return dataclasses.replace(
        config, strategy=dataclasses.replace(strategy, prefetch_bucket_size=0)
    )


def most_gathered(model: nn.Module, config: Config) -> int:
    """How many elements of `model` zero3 has gathered once it has prefetched as many as it may; 0
    if it does not, or keeps all of them anyway."""
    strategy = config.strategy
    if not isinstance(strategy, Zero3Config) or not strategy.prefetch_bucket_size:
        return 0
    if keeps_all_gathered(model, config):
        return 0
    # It stops behind the weight that reaches the limit.
    largest = max(each.numel() for each in decoder_layers(model)[-1].parameters())
    return min(_elements(model), int(_settings(config).max_live_parameters) + largest)


def gathered_ahead(engine: Any, most: int, itemsize: float) -> Callable[[], int]:
    """A function that returns how many bytes of weights prefetching would add now to those that are
    gathered: `most` elements in all. `engine`: DeepSpeed's. `itemsize`: mean bytes of one."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    gathered = "_PartitionedParameterCoordinator__n_available_params"
    return lambda: round(max(0, most - getattr(coordinator, gathered)) * itemsize)


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


def layers_in_a_bucket(model: nn.Module, config: Config) -> int:
    """How many layers of `model` have the gradients that DeepSpeed collects before it reduces them;
    0 under other strategies, and if only adapters or some layers are trained, which are few."""
    strategy = config.strategy
    if not isinstance(strategy, ZeroConfig) or config.method.name != "full":
        return 0
    return -(-strategy.reduce_bucket_size // _elements(decoder_layers(model)[-1]))


def _reuse_distance(config: Config) -> int | None:
    """Elements; None if the strategy is not zero3."""
    if not isinstance(config.strategy, Zero3Config):
        return None
    return int(_settings(config).max_reuse_distance)


def _settings(config: Config) -> Any:
    """DeepSpeed's own, with its defaults. The strategy must be zero3."""
    assert isinstance(config.strategy, Zero3Config)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    precision = PrecisionConfig(name="bf16")  # of no importance here
    zero = engine_config(config.strategy, config.training, precision, 1)["zero_optimization"]
    return DeepSpeedZeroConfig(**zero)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
