"""Optimizers, built over parameters that are already sharded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from launcher.config.optimizer import (
    AdafactorConfig,
    Adamw8bitConfig,
    AdamwConfig,
    AdamwPagedConfig,
    LionConfig,
    OptimizerConfig,
    SgdConfig,
)

Groups = list[dict[str, Any]]
# A parameter's name, itself as it is sharded, and its whole shape.
Trained = tuple[str, torch.nn.Parameter, torch.Size]
# The multiple of optimizer.learning_rate that a parameter of this name is trained with.
Rate = Callable[[str], float]
# Of a smaller tensor the moments stay in fp32, as bitsandbytes has it.
SMALLEST_IN_8BIT = 4096


def build_optimizer(
    config: OptimizerConfig, trained: Iterable[Trained], rate: Rate = lambda name: 1.0
) -> torch.optim.Optimizer:
    """The optimizer that `config` names. What it keeps of each parameter has the parameter's own
    shape, but for adafactor (rows, columns) and adamw_8bit (blocks): see `strategy.base`."""
    trained = list(trained)
    groups = parameter_groups(trained, config.learning_rate, config.weight_decay, rate)
    if isinstance(config, Adamw8bitConfig):
        whole = {id(parameter): shape.numel() for _, parameter, shape in trained}
        return _adamw_8bit(config, groups, whole)
    return BUILDERS[config.name](config, groups)


def state_dtype(config: OptimizerConfig) -> str | None:
    """Of what the optimizer keeps, in words; None: that of the trained weights."""
    if isinstance(config, Adamw8bitConfig):
        return f"uint8 in blocks with float32 scales (float32 below {SMALLEST_IN_8BIT:,} elements)"
    if isinstance(config, AdamwPagedConfig | LionConfig):
        return "float32"
    return "none" if isinstance(config, SgdConfig) and config.momentum == 0 else None


def parameter_groups(
    trained: Iterable[Trained], learning_rate: float, weight_decay: float, rate: Rate
) -> Groups:
    """One group a learning rate and decay, those at `learning_rate` itself first; weight decay
    spares vectors (norms, biases, DoRA's magnitudes)."""
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter, shape in trained:
        groups.setdefault((rate(name), len(shape) >= 2), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] != 1, key[0], not key[1]))
    return [
        {
            "params": groups[multiple, decayed],
            "lr": multiple * learning_rate,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for multiple, decayed in order
    ]


def _adamw(config: AdamwConfig, groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=_pair(config.betas), eps=config.epsilon, fused=True
    )


def _adamw_8bit(
    config: Adamw8bitConfig, groups: Groups, whole: dict[int, int]
) -> torch.optim.Optimizer:
    """`whole`: id of a parameter → elements of the whole tensor. They decide what is kept in 8
    bits: bitsandbytes' own choice by this rank's elements would differ from rank to rank."""
    from bitsandbytes.optim import AdamW8bit

    class Chosen(AdamW8bit):
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            chosen = super().get_config(gindex, pindex, group)
            return {**chosen, "min_8bit_size": group["min_8bit_size"]}

    split = []
    for group in groups:
        for small in (False, True):
            chosen = [p for p in group["params"] if (whole[id(p)] < SMALLEST_IN_8BIT) is small]
            if chosen:
                least = sys.maxsize if small else 0
                split.append({**group, "params": chosen, "min_8bit_size": least})
    return cast(
        torch.optim.Optimizer,
        Chosen(split, lr=config.learning_rate, betas=_pair(config.betas), eps=config.epsilon),
    )


def _adamw_paged(config: AdamwPagedConfig, groups: Groups) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW32bit

    return cast(
        torch.optim.Optimizer,
        PagedAdamW32bit(
            groups, lr=config.learning_rate, betas=_pair(config.betas), eps=config.epsilon
        ),
    )


def _adafactor(config: AdafactorConfig, groups: Groups) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return cast(
        torch.optim.Optimizer,
        Adafactor(
            groups,
            lr=config.learning_rate,
            clip_threshold=config.clip_threshold,
            decay_rate=config.decay_rate,
            scale_parameter=config.scale_parameter,
            relative_step=False,  # the scheduler decides
        ),
    )


def _sgd(config: SgdConfig, groups: Groups) -> torch.optim.Optimizer:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return torch.optim.SGD(
        groups,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        # On CPU torch's fused kernel leaves 16-bit weights as they are (pytorch/pytorch#191763).
        fused=all(parameter.dtype == torch.float32 for parameter in parameters),
    )


def _lion(config: LionConfig, groups: Groups) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion

    return cast(
        torch.optim.Optimizer, Lion(groups, lr=config.learning_rate, betas=_pair(config.betas))
    )


def _pair(betas: list[float]) -> tuple[float, float]:
    return betas[0], betas[1]


BUILDERS: dict[str, Callable[[Any, Groups], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_paged": _adamw_paged,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "lion": _lion,
}
