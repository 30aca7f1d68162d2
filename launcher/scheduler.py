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


def go_on_from(scheduler: LRScheduler, applied_steps: int) -> None:
    """Put `scheduler` where it was after so many applied steps."""
    if applied_steps:
        scheduler.last_epoch = applied_steps - 1
        scheduler._step_count = applied_steps + 1  # at 1 torch would warn of a step too early
        scheduler.step()
