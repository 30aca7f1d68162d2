"""Optimizers, built over parameters that are already sharded."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from launcher.config.optimizer import AdamwConfig


def build_optimizer(
    config: AdamwConfig, trained: Iterable[tuple[torch.nn.Parameter, torch.Size]]
) -> torch.optim.Optimizer:
    """Fused AdamW over parameters as they are sharded, each with its whole shape; weight decay
    spares vectors (norms, biases)."""
    decayed: list[torch.nn.Parameter] = []
    spared: list[torch.nn.Parameter] = []
    for parameter, shape in trained:
        (decayed if len(shape) >= 2 else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.epsilon,
        fused=True,
    )
