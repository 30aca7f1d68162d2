"""Schema of `scheduler=`: the learning rate over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.config.schema.setting import setting

MINIMUM = "lowest learning rate, at the end of the curve (not a fraction of the peak)"


@dataclass(kw_only=True, slots=True)
class SchedulerConfig:
    """The base of all schedulers."""

    name: str = setting(help="the scheduler")


@dataclass(kw_only=True, slots=True)
class ConstantConfig(SchedulerConfig):
    """The peak rate from the first step to the last."""


@dataclass(kw_only=True, slots=True)
class WarmupConfig(SchedulerConfig):
    """Linear warm-up from 0 to the peak, then constant."""

    warmup_steps: int = setting(0, "steps of linear warm-up from 0", minimum=0)
    warmup_ratio: float = setting(
        0.0,
        "warm-up as a fraction of all steps, rounded up; alternative to warmup_steps",
        minimum=0,
        maximum=1,
    )

    def warmup(self, total_steps: int) -> int:
        """Warm-up steps in a training of `total_steps`."""
        return self.warmup_steps or math.ceil(total_steps * self.warmup_ratio)


@dataclass(kw_only=True, slots=True)
class LinearConfig(WarmupConfig):
    """Linear decay."""

    minimum_rate: float = setting(0.0, MINIMUM, minimum=0)


@dataclass(kw_only=True, slots=True)
class CosineConfig(WarmupConfig):
    """Cosine decay: slow at first, fast in the middle, slow at the end."""

    minimum_rate: float = setting(0.0, MINIMUM, minimum=0)
    cycles: float = setting(0.5, "cosine waves after the warm-up; 0.5 decays once", above=0)


@dataclass(kw_only=True, slots=True)
class CosineWithRestartsConfig(WarmupConfig):
    """Several cosine decays, each from the peak."""

    minimum_rate: float = setting(0.0, MINIMUM, minimum=0)
    cycles: int = setting(1, "number of decays", minimum=1)


@dataclass(kw_only=True, slots=True)
class PolynomialConfig(WarmupConfig):
    """Decay as a power of the remaining steps."""

    minimum_rate: float = setting(1e-7, MINIMUM, minimum=0)
    power: float = setting(1.0, "1: linear; 2: fast at first; 0.5: fast at the end", above=0)


@dataclass(kw_only=True, slots=True)
class InverseSqrtConfig(WarmupConfig):
    """Decay as 1 / √steps. The curve has no fixed end, so training can be extended."""

    timescale: int | None = setting(
        None,
        "the rate is half the peak three times this many steps after the warm-up; null: the length "
        "of the warm-up, or 10,000 without warm-up",
        minimum=1,
    )


@dataclass(kw_only=True, slots=True)
class PlateauConfig(SchedulerConfig):
    """The peak rate, reduced whenever the evaluation loss stops falling (torch's
    ReduceLROnPlateau). It counts evaluations, not steps."""

    factor: float = setting(0.1, "the rate is multiplied by this, below 1", above=0)
    patience: int = setting(10, "evaluations without improvement that are tolerated", minimum=0)
    threshold: float = setting(
        1e-4, "minimum improvement, as a fraction of the best evaluation loss", minimum=0
    )
    cooldown: int = setting(0, "evaluations after a reduction that are not counted", minimum=0)
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
