"""Schema of `precision=`: the dtypes of weights and computation."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.setting import setting


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Trained weights, the reduction of their gradients and the optimizer state are in fp32 under
    every precision except pure_bf16."""

    name: str = setting(help="dtype of frozen weights and of the computation")


@dataclass(kw_only=True, slots=True)
class Fp16Config(PrecisionConfig):
    """fp16 has a narrow range: the loss is scaled up so that small gradients do not become zero,
    and a step whose gradient overflows is skipped."""

    initial_scale_power: int = setting(
        16, "the loss scale starts at 2 to this power", minimum=0, maximum=32
    )
    growth_window: int = setting(
        1000, "steps without an overflow after which the loss scale doubles", minimum=1
    )
    hysteresis: int = setting(
        2, "overflows after which the loss scale halves; until then steps are skipped", minimum=1
    )
    minimum_scale: float = setting(1.0, "lower limit of the loss scale", above=0)


@dataclass(kw_only=True, slots=True)
class AutoPrecisionConfig(PrecisionConfig):
    """bf16 if every rank has a GPU that computes in it, fp16 on older GPUs, fp32 on CPU. The frozen
    configuration has what was chosen."""


PRECISIONS: dict[str, type[PrecisionConfig]] = {
    "fp32": PrecisionConfig,
    "bf16": PrecisionConfig,
    "fp16": Fp16Config,
    "pure_bf16": PrecisionConfig,
}
