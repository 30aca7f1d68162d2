"""Learning-rate schedules: transformers' own, by their usual names."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from launcher.config.scheduler import SchedulerConfig


def build_scheduler(
    config: SchedulerConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> LRScheduler:
    """Advance it once for each applied optimizer step."""
    scheduler: LRScheduler = get_scheduler(
        config.name,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=total_steps,
    )
    return scheduler
