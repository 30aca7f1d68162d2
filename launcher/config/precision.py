"""Schema of `precision=`: the dtype of the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Trainable parameters, their gradients' reduction and the optimizer state are always fp32."""

    name: str = setting(help="dtype of frozen weights and of the arithmetic")


PRECISIONS: dict[str, type[PrecisionConfig]] = {"fp32": PrecisionConfig, "bf16": PrecisionConfig}
