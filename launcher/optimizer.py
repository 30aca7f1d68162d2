"""Optimizers, built over parameters that are already sharded."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from launcher.config.optimizer import AdamwConfig


def build_optimizer(
    config: AdamwConfig, parameters: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """Fused AdamW over `parameters`; weight decay spares vectors (norms, biases)."""
    trained = list(parameters)
    groups = [
        {
            "params": [parameter for parameter in trained if parameter.ndim >= 2],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in trained if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.epsilon,
        fused=True,
    )
