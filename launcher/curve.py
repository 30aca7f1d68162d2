"""The learning rate as a function of the step. Imports no torch: a curve is drawn before a run.

The formulas are those of transformers' optimization.py in the order of its operations, so that
every value is equal to its to the last bit.
"""

from __future__ import annotations

import math

from launcher.config.scheduler import (
    CosineConfig,
    CosineWithRestartsConfig,
    InverseSqrtConfig,
    LinearConfig,
    PolynomialConfig,
    SchedulerConfig,
    WarmupConfig,
)


def factor(config: SchedulerConfig, peak: float, total_steps: int, step: int) -> float:
    """What the peak rate `peak` is multiplied by after `step` of `total_steps` steps."""
    if not isinstance(config, WarmupConfig):
        return 1.0
    warmup = config.warmup(total_steps)
    if step < warmup:
        return float(step) / float(max(1, warmup))
    if isinstance(config, InverseSqrtConfig):
        timescale = config.timescale or warmup or 10_000
        return 1.0 / math.sqrt((step + (timescale - warmup)) / timescale)
    if isinstance(config, PolynomialConfig):
        return _polynomial(config, peak, total_steps, step)
    if isinstance(config, LinearConfig):
        left = float(total_steps - step) / float(max(1, total_steps - warmup))
        return _above(config.minimum_rate / peak, max(0.0, left))
    progress = float(step - warmup) / float(max(1, total_steps - warmup))
    if isinstance(config, CosineConfig):
        wave = 0.5 * (1.0 + math.cos(math.pi * float(config.cycles) * 2.0 * progress))
        return _above(config.minimum_rate / peak, wave)
    if isinstance(config, CosineWithRestartsConfig):
        wave = 0.5 * (1.0 + math.cos(math.pi * ((float(config.cycles) * progress) % 1.0)))
        return _above(config.minimum_rate / peak, wave if progress < 1.0 else 0.0)
    return 1.0


def rates(config: SchedulerConfig, peak: float, total_steps: int) -> list[float]:
    """The learning rate of each step, as metrics.jsonl will have it."""
    return [peak * factor(config, peak, total_steps, step) for step in range(total_steps)]


def _above(minimum: float, value: float) -> float:
    """`value` from 0 to 1 as a value from `minimum` to 1."""
    return max(0.0, value * (1 - minimum) + minimum)


def _polynomial(config: PolynomialConfig, peak: float, total_steps: int, step: int) -> float:
    end, decaying = config.minimum_rate, total_steps - config.warmup(total_steps)
    if step > total_steps or not decaying:
        return end / peak
    left = 1 - (step - config.warmup(total_steps)) / decaying
    return float(((peak - end) * left**config.power + end) / peak)
