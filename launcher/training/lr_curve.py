"""The learning rate as a function of the step. Imports no torch: curves are drawn before a run.

The formulas, and the order of their operations, are those of transformers' optimization.py: every
value is equal to the bit.
"""

from __future__ import annotations

import math

from launcher.config.schema.scheduler import (
    CosineConfig,
    CosineWithRestartsConfig,
    InverseSqrtConfig,
    LinearConfig,
    PolynomialConfig,
    SchedulerConfig,
    WarmupConfig,
)


def lr_factor(config: SchedulerConfig, peak: float, total_steps: int, step: int) -> float:
    """The factor on the peak learning rate `peak` after `step` of `total_steps` steps."""
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
        remaining = float(total_steps - step) / float(max(1, total_steps - warmup))
        return _rescale(config.minimum_rate / peak, max(0.0, remaining))
    progress = float(step - warmup) / float(max(1, total_steps - warmup))
    if isinstance(config, CosineConfig):
        wave = 0.5 * (1.0 + math.cos(math.pi * float(config.cycles) * 2.0 * progress))
        return _rescale(config.minimum_rate / peak, wave)
    if isinstance(config, CosineWithRestartsConfig):
        wave = 0.5 * (1.0 + math.cos(math.pi * ((float(config.cycles) * progress) % 1.0)))
        return _rescale(config.minimum_rate / peak, wave if progress < 1.0 else 0.0)
    return 1.0


def learning_rates(config: SchedulerConfig, peak: float, total_steps: int) -> list[float]:
    """The learning rate of each step, as in metrics.jsonl."""
    return [peak * lr_factor(config, peak, total_steps, step) for step in range(total_steps)]


def _rescale(minimum: float, value: float) -> float:
    """Map `value` from the range 0 to 1 to the range `minimum` to 1."""
    return max(0.0, value * (1 - minimum) + minimum)


def _polynomial(config: PolynomialConfig, peak: float, total_steps: int, step: int) -> float:
    end, decay_steps = config.minimum_rate, total_steps - config.warmup(total_steps)
    if step > total_steps or not decay_steps:
        return end / peak
    remaining = 1 - (step - config.warmup(total_steps)) / decay_steps
    return float(((peak - end) * remaining**config.power + end) / peak)
