"""Optimizers, built over parameters that are already sharded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from launcher.config.schema.optimizer import (
    AdafactorConfig,
    Adamw8bitConfig,
    AdamwConfig,
    AdamwPagedConfig,
    LionConfig,
    OptimizerConfig,
    SgdConfig,
)
from launcher.strategy.base import TrainedParameter

ParamGroups = list[dict[str, Any]]
# The name of a parameter → the factor on its learning rate.
LrMultiplier = Callable[[str], float]
# The moments of a smaller tensor stay in fp32, as in bitsandbytes.
MIN_8BIT_SIZE = 4096


def build_optimizer(
    config: OptimizerConfig,
    trained: Iterable[TrainedParameter],
    lr_multiplier: LrMultiplier = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over parameters that are already sharded.

    Its state has the shape of each parameter, except for adafactor (rows, columns) and adamw_8bit
    (blocks): see `launcher.strategy.optimizer_state`.
    """
    trained = list(trained)
    groups = parameter_groups(trained, config.learning_rate, config.weight_decay, lr_multiplier)
    if isinstance(config, Adamw8bitConfig):
        full_numel = {id(parameter): shape.numel() for _, parameter, shape in trained}
        return _adamw_8bit(config, groups, full_numel)
    return BUILDERS[config.name](config, groups)


def state_dtype(config: OptimizerConfig) -> str | None:
    """The dtype of the optimizer's state as text; None: the dtype of the trained weights."""
    if isinstance(config, Adamw8bitConfig):
        return f"uint8 in blocks with float32 scales (float32 below {MIN_8BIT_SIZE:,} elements)"
    if isinstance(config, AdamwPagedConfig | LionConfig):
        return "float32"
    return "none" if isinstance(config, SgdConfig) and config.momentum == 0 else None


def parameter_groups(
    trained: Iterable[TrainedParameter],
    learning_rate: float,
    weight_decay: float,
    lr_multiplier: LrMultiplier,
) -> ParamGroups:
    """One group for each learning rate and weight decay; the groups with `learning_rate` come
    first. Vectors (norms, biases, DoRA's magnitudes) have no weight decay."""
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter, shape in trained:
        groups.setdefault((lr_multiplier(name), len(shape) >= 2), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] != 1, key[0], not key[1]))
    return [
        {
            "params": groups[multiplier, has_decay],
            "lr": multiplier * learning_rate,
            "weight_decay": weight_decay if has_decay else 0.0,
        }
        for multiplier, has_decay in order
    ]


def _adamw(config: AdamwConfig, groups: ParamGroups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=_betas(config), eps=config.epsilon, fused=True
    )


def _adamw_8bit(
    config: Adamw8bitConfig, groups: ParamGroups, full_numel: dict[int, int]
) -> torch.optim.Optimizer:
    """`full_numel`: id of a parameter → number of elements of the full tensor. It decides which
    moments have 8 bits. bitsandbytes itself would decide by the elements of this rank's shard, and
    ranks could decide differently."""
    from bitsandbytes.optim import AdamW8bit

    class GroupedAdamW8bit(AdamW8bit):
        """Takes `min_8bit_size` from each parameter group."""

        step = _step_without_waiting  # type: ignore[assignment]

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            settings = super().get_config(gindex, pindex, group)
            return {**settings, "min_8bit_size": group["min_8bit_size"]}

    split_groups = []
    for group in groups:
        for is_small in (False, True):
            params = [p for p in group["params"] if (full_numel[id(p)] < MIN_8BIT_SIZE) is is_small]
            if params:
                min_8bit_size = sys.maxsize if is_small else 0
                split_groups.append({**group, "params": params, "min_8bit_size": min_8bit_size})
    return cast(
        torch.optim.Optimizer,
        GroupedAdamW8bit(
            split_groups, lr=config.learning_rate, betas=_betas(config), eps=config.epsilon
        ),
    )


def _adamw_paged(config: AdamwPagedConfig, groups: ParamGroups) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW32bit

    return cast(
        torch.optim.Optimizer,
        PagedAdamW32bit(groups, lr=config.learning_rate, betas=_betas(config), eps=config.epsilon),
    )


def _adafactor(config: AdafactorConfig, groups: ParamGroups) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return cast(
        torch.optim.Optimizer,
        Adafactor(
            groups,
            lr=config.learning_rate,
            clip_threshold=config.clip_threshold,
            decay_rate=config.decay_rate,
            scale_parameter=config.scale_parameter,
            relative_step=False,  # the scheduler sets the learning rate
        ),
    )


def _sgd(config: SgdConfig, groups: ParamGroups) -> torch.optim.Optimizer:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return torch.optim.SGD(
        groups,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        # On CPU, torch's fused kernel does not update 16-bit weights (pytorch/pytorch#191763).
        fused=all(parameter.dtype == torch.float32 for parameter in parameters),
    )


def _lion(config: LionConfig, groups: ParamGroups) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion

    class LionWithoutWaits(Lion):
        step = _step_without_waiting  # type: ignore[assignment]

    optimizer = LionWithoutWaits(groups, lr=config.learning_rate, betas=_betas(config))
    return cast(torch.optim.Optimizer, optimizer)


@torch.no_grad()
def _step_without_waiting(optimizer: Any) -> None:
    """The step of an optimizer of bitsandbytes whose state is not paged.

    bitsandbytes' own makes the host wait for the GPU after every parameter. Only paged state needs
    that.
    """
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, group_index, index)
            optimizer.update_step(group, parameter, group_index, index)


def _betas(config: AdamwConfig | LionConfig) -> tuple[float, float]:
    return config.betas[0], config.betas[1]


BUILDERS: dict[str, Callable[[Any, ParamGroups], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_paged": _adamw_paged,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "lion": _lion,
}
