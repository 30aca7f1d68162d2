"""The steps of a configuration: where training ends, evaluates, saves and logs."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.schema.scheduler import WarmupConfig
from launcher.errors import UserError
from launcher.training.loop import Plan


def make_plan(config: Config, steps_per_epoch: int) -> Plan:
    """The steps at which training ends, evaluates, saves and logs.

    Raises UserError if the warm-up is longer than training.epochs.
    """
    training = config.training
    total_steps = training.max_steps or (training.epochs or 0) * steps_per_epoch
    scheduler = config.scheduler
    if isinstance(scheduler, WarmupConfig) and scheduler.warmup_steps > total_steps:
        raise UserError(
            f"scheduler.warmup_steps={scheduler.warmup_steps} is more than the {total_steps} steps "
            f"of training.epochs={training.epochs}: the peak rate is never reached "
            f"→ scheduler.warmup_steps={total_steps // 10}, or scheduler.warmup_ratio=0.1"
        )
    return Plan(
        total_steps=total_steps,
        end_step=min(total_steps, training.stop_after_steps or total_steps),
        max_grad_norm=training.max_grad_norm,
        max_nonfinite_steps=training.skipped_steps,
        eval_steps=training.eval_steps,
        save_steps=config.checkpoint.save_steps,
        log_steps=training.log_steps,
        label_smoothing=training.label_smoothing,
        save_best=config.checkpoint.save_best,
    )


def planned_end(config: Config, plan: Plan) -> str | None:
    """The setting that ends training before its schedule does, None if none does."""
    if plan.end_step == plan.total_steps:
        return None
    return f"training.stop_after_steps={config.training.stop_after_steps}"
