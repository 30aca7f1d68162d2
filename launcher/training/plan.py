"""The steps of a run: where training ends, evaluates, saves and logs."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.scheduler import SchedulerConfig, WarmupConfig
from launcher.config.schema.training import CheckpointConfig, TrainingConfig
from launcher.errors import UserError


@dataclass(frozen=True)
class Plan:
    """When to evaluate, save, log and end, in optimizer steps, and the scalars of a step."""

    total_steps: int  # of the schedule
    end_step: int  # training ends here; less than total_steps if it is to be resumed later
    max_grad_norm: float
    eval_steps: int | None
    save_steps: int | None
    log_steps: int
    label_smoothing: float = 0.0
    max_nonfinite_steps: int = 20  # the run ends after this many consecutive steps
    save_best: bool = False  # after every evaluation with the lowest loss until then

    @classmethod
    def from_config(
        cls,
        training: TrainingConfig,
        checkpoint: CheckpointConfig,
        scheduler: SchedulerConfig,
        steps_per_epoch: int,
    ) -> Plan:
        """What the settings ask for. Raises UserError if the warm-up is longer than
        training.epochs."""
        total_steps = training.max_steps or (training.epochs or 0) * steps_per_epoch
        if isinstance(scheduler, WarmupConfig) and scheduler.warmup_steps > total_steps:
            raise UserError(
                f"scheduler.warmup_steps={scheduler.warmup_steps} is more than the {total_steps} "
                f"steps of training.epochs={training.epochs}: the peak rate is never reached "
                f"→ scheduler.warmup_steps={total_steps // 10}, or scheduler.warmup_ratio=0.1"
            )
        return cls(
            total_steps=total_steps,
            end_step=min(total_steps, training.stop_after_steps or total_steps),
            max_grad_norm=training.max_grad_norm,
            max_nonfinite_steps=training.skipped_steps,
            eval_steps=training.eval_steps,
            save_steps=checkpoint.save_steps,
            log_steps=training.log_steps,
            label_smoothing=training.label_smoothing,
            save_best=checkpoint.save_best,
        )

    def should_evaluate(self, step: int) -> bool:
        """Whether to evaluate after `step`."""
        return step == self.end_step or _is_due(self.eval_steps, step)

    def should_save(self, step: int) -> bool:
        """Whether to save a checkpoint after `step`, whatever its loss."""
        return step == self.end_step or _is_due(self.save_steps, step)

    def is_scheduled_evaluation(self, step: int) -> bool:
        """Whether the evaluation after `step` counts for the schedule and for the lowest loss. An
        evaluation at an early end does not: an uninterrupted training would not have it."""
        return step == self.total_steps or _is_due(self.eval_steps, step)

    def should_flush(self, step: int) -> bool:
        """Whether the records until `step` are logged before the next step."""
        return self.should_evaluate(step) or self.should_save(step) or _is_due(self.log_steps, step)


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
