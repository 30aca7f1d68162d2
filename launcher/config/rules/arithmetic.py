"""The rules of `training.tf32` and `training.deterministic`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.rules.rule import Example, Machine, Rule, World


def _has_no_tf32(config: Config, world: World) -> bool:
    computes_in_fp32 = config.precision.name in ("fp32", "auto")
    return config.training.tf32 and (world.gpus == 0 or not computes_in_fp32)


ARITHMETIC_RULES: tuple[Rule, ...] = (
    Rule(
        "tf32-is-for-fp32-on-gpus",
        "training.tf32 is used with precision=fp32 on GPUs",
        _has_no_tf32,
        lambda c, w: (
            f"training.tf32=true changes how GPUs compute in fp32, but precision={c.precision.name}"
            if w.gpus
            else "training.tf32=true changes how GPUs compute, and no GPU is visible"
        ),
        lambda c, w: "precision=fp32, or training.tf32=false" if w.gpus else "training.tf32=false",
        Example("training.tf32=true precision=bf16", Machine(gpus=1)),
    ),
    Rule(
        "deterministic-compiles-always-alike",
        "training.deterministic is not used with training.compile=auto",
        lambda c, w: c.training.deterministic and c.training.compile == "auto",
        lambda c, w: (
            "training.deterministic=true with training.compile=auto: auto chooses by the clock, so "
            "two runs may compute differently"
        ),
        lambda c, w: "training.compile=off, or training.compile=on",
        Example("training.deterministic=true training.compile=auto"),
    ),
)
