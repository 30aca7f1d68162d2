"""Schema of `optimizer=`."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class AdamwConfig:
    """Fused AdamW."""

    name: str = setting("adamw", "the optimizer")
    learning_rate: float = setting(1e-4, "peak learning rate", above=0)
    weight_decay: float = setting(0.0, "decoupled decay of matrices (not norms, biases)", minimum=0)
    betas: list[float] = setting([0.9, 0.999], "decay of the two moments, each below 1", minimum=0)
    epsilon: float = setting(1e-8, "added to the denominator", above=0)


OPTIMIZERS: dict[str, type[AdamwConfig]] = {"adamw": AdamwConfig}
