"""Dynamic loss scaling (https://arxiv.org/abs/1710.03740), with DeepSpeed's rules everywhere.

An overflow skips the step; the scale halves once `hysteresis` of them are used up, and doubles
after `growth_window` steps without one (deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler).
Skipped steps count for the window. The scale itself is a power of two times the first one, so that
scaling and unscaling are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.precision import Fp16Config

FACTOR = 2.0


@dataclass
class LossScale:
    """The scale of the next step, and what decides the one after it."""

    growth_window: int
    hysteresis: int
    minimum: float
    scale: float
    tolerance: int  # overflows that are left until the scale halves
    steps: int = 0
    last_overflow: int = -1  # a step, counted from 0

    @classmethod
    def of(cls, config: Fp16Config) -> LossScale:
        first = FACTOR**config.initial_scale_power
        return cls(
            config.growth_window, config.hysteresis, config.minimum_scale, first, config.hysteresis
        )

    def update(self, overflow: bool) -> None:
        """After a step, whether it overflowed on any rank."""
        if overflow:
            if self.tolerance == 1:
                self.scale = max(self.scale / FACTOR, self.minimum)
            else:
                self.tolerance -= 1
            self.last_overflow = self.steps
        else:
            calm = self.steps - self.last_overflow - 1
            if calm > 0 and calm % self.growth_window == 0:
                self.tolerance = self.hysteresis
                self.scale *= FACTOR
        self.steps += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {
            "scale": self.scale,
            "tolerance": self.tolerance,
            "steps": self.steps,
            "last_overflow": self.last_overflow,
        }

    def load(self, state: dict[str, float]) -> None:
        self.scale = float(state["scale"])
        self.tolerance = int(state["tolerance"])
        self.steps, self.last_overflow = int(state["steps"]), int(state["last_overflow"])
