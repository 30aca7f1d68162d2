"""Schema of `precision=`: the dtype of the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """What is trained is kept in fp32, with its gradients' reduction and the optimizer state, under
    every precision but pure_bf16."""

    name: str = setting(help="dtype of frozen weights and of the arithmetic")


@dataclass(kw_only=True, slots=True)
class Fp16Config(PrecisionConfig):
    """fp16 has a narrow range: the loss is scaled up so that small gradients survive, and a step
    whose gradient overflows is skipped."""

    initial_scale_power: int = setting(
        16, "the loss scale begins at 2 to this power", minimum=0, maximum=32
    )
    growth_window: int = setting(
        1000, "steps without an overflow after which the scale doubles", minimum=1
    )
    hysteresis: int = setting(
        2, "overflows after which the scale halves; until then a step is only skipped", minimum=1
    )
    minimum_scale: float = setting(1.0, "the scale never falls below", above=0)


PRECISIONS: dict[str, type[PrecisionConfig]] = {
    "fp32": PrecisionConfig,
    "bf16": PrecisionConfig,
    "fp16": Fp16Config,
    "pure_bf16": PrecisionConfig,
}
