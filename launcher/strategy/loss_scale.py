"""Dynamic loss scaling (https://arxiv.org/abs/1710.03740), with DeepSpeed's rules everywhere.

A step that overflows is skipped. The scale is halved after `hysteresis` overflows, and doubled
after `growth_window` steps without one (deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler).
Skipped steps count toward the window. The scale is always the initial scale times a power of two,
so scaling and unscaling are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.precision import Fp16Config

FACTOR = 2.0


@dataclass
class LossScale:
    """The scale of the next step, and the state that decides the following one."""

    growth_window: int
    hysteresis: int
    minimum: float
    scale: float
    tolerance: int  # overflows until the scale is halved
    steps: int = 0
    last_overflow: int = -1  # the step that overflowed last, counted from 0

    @classmethod
    def from_config(cls, config: Fp16Config) -> LossScale:
        """The scale before the first step."""
        initial_scale = FACTOR**config.initial_scale_power
        return cls(
            config.growth_window,
            config.hysteresis,
            config.minimum_scale,
            initial_scale,
            config.hysteresis,
        )

    def update(self, overflow: bool) -> None:
        """Call this after each step: `overflow` is True if it overflowed on any rank."""
        if overflow:
            if self.tolerance == 1:
                self.scale = max(self.scale / FACTOR, self.minimum)
            else:
                self.tolerance -= 1
            self.last_overflow = self.steps
        else:
            steps_since_overflow = self.steps - self.last_overflow - 1
            if steps_since_overflow > 0 and steps_since_overflow % self.growth_window == 0:
                self.tolerance = self.hysteresis
                self.scale *= FACTOR
        self.steps += 1

    def state(self) -> dict[str, float]:
        """The state that a checkpoint saves."""
        return {
            "scale": self.scale,
            "tolerance": self.tolerance,
            "steps": self.steps,
            "last_overflow": self.last_overflow,
        }

    def load_state(self, state: dict[str, float]) -> None:
        """Restore what `state` returned."""
        self.scale = float(state["scale"])
        self.tolerance = int(state["tolerance"])
        self.steps, self.last_overflow = int(state["steps"]), int(state["last_overflow"])
