"""The rules of the schedule and of everything that depends on the evaluation loss."""

from __future__ import annotations

from collections.abc import Callable

from launcher.config import Config
from launcher.config.rules.rule import Example, Rule, World
from launcher.config.schema.scheduler import (
    CosineConfig,
    CosineWithRestartsConfig,
    LinearConfig,
    PlateauConfig,
    PolynomialConfig,
    WarmupConfig,
)

# The schedulers with `minimum_rate`.
WITH_MINIMUM = (
    LinearConfig,
    CosineConfig,
    CosineWithRestartsConfig,
    PolynomialConfig,
    PlateauConfig,
)


def _warmup_steps(config: Config) -> int:
    return config.scheduler.warmup_steps if isinstance(config.scheduler, WarmupConfig) else 0


def _two_warmups(config: Config, world: World) -> bool:
    return _warmup_steps(config) > 0 and config.scheduler.warmup_ratio > 0  # type: ignore[attr-defined]


def _minimum_rate(config: Config) -> float:
    return config.scheduler.minimum_rate if isinstance(config.scheduler, WITH_MINIMUM) else 0.0


def _evaluation_overrides(config: Config, world: World) -> str:
    """The overrides that turn on evaluation during training."""
    steps = f"training.eval_steps={max(1, (config.training.max_steps or 500) // 10)}"
    return steps if config.data.evaluates else f"{steps} data.eval_rows=32"


def _needs_evaluation(
    id: str,
    setting: str,
    is_used: Callable[[Config], bool],
    override: Callable[[Config], str],
    example: str,
) -> Rule:
    """The rule that `setting`, which depends on the evaluation loss, needs evaluations.

    Args:
        is_used: Whether a configuration uses the setting.
        override: The override that uses it, for the message.
    """
    return Rule(
        id,
        f"{setting} needs training.eval_steps",
        lambda c, w: is_used(c) and c.training.eval_steps is None,
        lambda c, w: (
            f"{override(c)} depends on the evaluation loss, but training.eval_steps=null "
            "evaluates only at the end"
        ),
        _evaluation_overrides,
        Example(example),
    )


SCHEDULE_RULES: tuple[Rule, ...] = (
    Rule(
        "one-warmup",
        "at most one of scheduler.warmup_steps and scheduler.warmup_ratio is set",
        _two_warmups,
        lambda c, w: (
            f"scheduler.warmup_steps={_warmup_steps(c)} and scheduler.warmup_ratio="
            f"{c.scheduler.warmup_ratio} both set the length of the warm-up"  # type: ignore[attr-defined]
        ),
        lambda c, w: "scheduler.warmup_ratio=0",
        Example("scheduler.warmup_steps=100 scheduler.warmup_ratio=0.1"),
    ),
    Rule(
        "warmup-ends",
        "the warm-up ends before training does",
        lambda c, w: c.training.max_steps is not None and _warmup_steps(c) > c.training.max_steps,
        lambda c, w: (
            f"scheduler.warmup_steps={_warmup_steps(c)} is more than "
            f"training.max_steps={c.training.max_steps}: the peak rate is never reached"
        ),
        lambda c, w: f"scheduler.warmup_steps={(c.training.max_steps or 0) // 10}",
        Example("scheduler.warmup_steps=200 training.max_steps=100 training.epochs=null"),
    ),
    Rule(
        "minimum-below-peak",
        "scheduler.minimum_rate is a learning rate below optimizer.learning_rate",
        lambda c, w: _minimum_rate(c) >= c.optimizer.learning_rate,
        lambda c, w: (
            f"scheduler.minimum_rate={_minimum_rate(c):g} is not below "
            f"optimizer.learning_rate={c.optimizer.learning_rate:g} (it is a learning rate, not a "
            "fraction of one)"
        ),
        lambda c, w: f"scheduler.minimum_rate={c.optimizer.learning_rate / 10:g}",
        Example("scheduler.minimum_rate=0.1"),
    ),
    Rule(
        "plateau-reduces",
        "scheduler.factor of reduce_lr_on_plateau is below 1",
        lambda c, w: isinstance(c.scheduler, PlateauConfig) and c.scheduler.factor >= 1,
        lambda c, w: (
            f"scheduler.factor={c.scheduler.factor:g} does not reduce the learning rate"  # type: ignore[attr-defined]
        ),
        lambda c, w: "scheduler.factor=0.5",
        Example(
            "scheduler=reduce_lr_on_plateau scheduler.factor=1 "
            "training.eval_steps=50 data.eval_rows=32"
        ),
    ),
    _needs_evaluation(
        "plateau-needs-evaluation",
        "scheduler=reduce_lr_on_plateau",
        lambda c: isinstance(c.scheduler, PlateauConfig),
        lambda c: f"scheduler={c.scheduler.name}",
        "scheduler=reduce_lr_on_plateau",
    ),
    _needs_evaluation(
        "early-stopping-needs-evaluation",
        "training.early_stopping_patience",
        lambda c: c.training.early_stopping_patience is not None,
        lambda c: f"training.early_stopping_patience={c.training.early_stopping_patience}",
        "training.early_stopping_patience=3",
    ),
    Rule(
        "rewind-needs-checkpoints",
        "training.on_spike=rewind needs checkpoint.save_steps",
        lambda c, w: c.training.on_spike == "rewind" and c.checkpoint.save_steps is None,
        lambda c, w: (
            "training.on_spike=rewind goes back to a checkpoint, but checkpoint.save_steps=null "
            "saves only at the end"
        ),
        lambda c, w: f"checkpoint.save_steps={max(1, (c.training.max_steps or 500) // 10)}",
        Example("training.on_spike=rewind"),
    ),
    Rule(
        "rewind-needs-state",
        "training.on_spike=rewind needs checkpoint.content=all",
        lambda c, w: c.training.on_spike == "rewind" and c.checkpoint.content != "all",
        lambda c, w: (
            "training.on_spike=rewind goes back to a checkpoint, but checkpoint.content="
            f"{c.checkpoint.content} saves no optimizer state"
        ),
        lambda c, w: "checkpoint.content=all",
        Example("training.on_spike=rewind checkpoint.save_steps=10 checkpoint.content=weights"),
    ),
    _needs_evaluation(
        "best-needs-evaluation",
        "checkpoint.save_best",
        lambda c: c.checkpoint.save_best,
        lambda c: "checkpoint.save_best=true",
        "checkpoint.save_best=true",
    ),
)
