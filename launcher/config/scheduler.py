"""Schema of `scheduler=`: the learning rate over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.config.setting import setting

MINIMUM = "lowest learning rate, where the curve ends (not a fraction of the peak)"


@dataclass(kw_only=True, slots=True)
class SchedulerConfig:
    name: str = setting(help="the scheduler")


@dataclass(kw_only=True, slots=True)
class ConstantConfig(SchedulerConfig):
    """The peak rate throughout, from the first step."""


@dataclass(kw_only=True, slots=True)
class WarmupConfig(SchedulerConfig):
    """Straight up from 0 to the peak, which stays."""

    warmup_steps: int = setting(0, "steps of linear warm-up from 0", minimum=0)
    warmup_ratio: float = setting(
        0.0, "warm-up as a part of all steps, rounded up; or say warmup_steps", minimum=0, maximum=1
    )

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a training of so many."""
        return self.warmup_steps or math.ceil(total_steps * self.warmup_ratio)


@dataclass(kw_only=True, slots=True)
class LinearConfig(WarmupConfig):
    """Straight down."""

    minimum_rate: float = setting(0.0, MINIMUM, minimum=0)


@dataclass(kw_only=True, slots=True)
class CosineConfig(WarmupConfig):
    """Half a cosine down: slow at first, fast in the middle, slow at the end."""

    minimum_rate: float = setting(0.0, MINIMUM, minimum=0)
    cycles: float = setting(0.5, "waves after the warm-up; 0.5 goes down once", above=0)


@dataclass(kw_only=True, slots=True)
class CosineWithRestartsConfig(WarmupConfig):
    """Half a cosine down, several times, each from the peak."""

    minimum_rate: float = setting(0.0, MINIMUM, minimum=0)
    cycles: int = setting(1, "times that it goes down", minimum=1)


@dataclass(kw_only=True, slots=True)
class PolynomialConfig(WarmupConfig):
    """Down as a power of the steps that are left."""

    minimum_rate: float = setting(1e-7, MINIMUM, minimum=0)
    power: float = setting(1.0, "1 is straight; 2 falls fast at first, 0.5 at the end", above=0)


@dataclass(kw_only=True, slots=True)
class InverseSqrtConfig(WarmupConfig):
    """Down as 1 / √steps: no end is built in, so that training can be prolonged."""

    timescale: int | None = setting(
        None,
        "three times so many steps after the warm-up the rate is halved; null is the warm-up's "
        "length, or 10,000 without one",
        minimum=1,
    )


@dataclass(kw_only=True, slots=True)
class PlateauConfig(SchedulerConfig):
    """The peak rate, and less of it whenever the evaluation loss has stopped falling (torch's
    ReduceLROnPlateau). Evaluations are counted, not steps."""

    factor: float = setting(0.1, "the rate is multiplied by it, below 1", above=0)
    patience: int = setting(10, "evaluations without improvement that are borne", minimum=0)
    threshold: float = setting(
        1e-4, "an improvement is more than this part of the best evaluation loss", minimum=0
    )
    cooldown: int = setting(0, "evaluations after a reduction that do not count", minimum=0)
    minimum_rate: float = setting(0.0, MINIMUM, minimum=0)


SCHEDULERS: dict[str, type[SchedulerConfig]] = {
    "linear": LinearConfig,
    "cosine": CosineConfig,
    "cosine_with_restarts": CosineWithRestartsConfig,
    "polynomial": PolynomialConfig,
    "constant": ConstantConfig,
    "constant_with_warmup": WarmupConfig,
    "inverse_sqrt": InverseSqrtConfig,
    "reduce_lr_on_plateau": PlateauConfig,
}
