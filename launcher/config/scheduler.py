"""Schema of `scheduler=`: the learning rate over the steps."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class SchedulerConfig:
    """Values are those of transformers' scheduler of the same name."""

    name: str = setting(help="shape of the curve after warm-up")
    warmup_steps: int = setting(0, "steps of linear warm-up from 0", minimum=0)


SCHEDULERS: dict[str, type[SchedulerConfig]] = dict.fromkeys(
    ("linear", "cosine", "constant"), SchedulerConfig
)
