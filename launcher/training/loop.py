"""The training loop: the only one, for all methods, strategies and precisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from launcher.data.loader import StepBatch
from launcher.run import heartbeat
from launcher.run.heartbeat import EVALUATION, Phase
from launcher.strategy import Strategy
from launcher.tracking.base import Observer, Record
from launcher.training.agreed_steps import AgreedSteps
from launcher.training.loss import RouterShare, token_loss, weighted_losses
from launcher.training.metrics import MetricsBuffer, StepStats
from launcher.training.nonfinite import first_bad_module
from launcher.training.plan import Plan
from launcher.training.state import Progress, TrainState
from launcher.training.throughput import ThroughputMeter


class StepLoader(Protocol):
    """The batches of steps, counted from 0 over all epochs."""

    @property
    def steps_per_epoch(self) -> int: ...

    def step_batch(self, step: int) -> StepBatch:
        """This rank's share of step `step`."""


class Checkpoints(Protocol):
    """Saves the trained state. All ranks make the same calls; an error on one is raised on all."""

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        """Save the state after `step`, now or in the background."""

    def failed(self) -> bool:
        """Whether a save in the background has failed; the next call raises its error."""

    def finish(self) -> None:
        """Wait until the last save is on disk."""


# Whether this rank wants training to end. All ranks then end after the same step, this one or the
# next.
StopRequested = Callable[[], bool]


@dataclass(frozen=True)
class StepLoaders:
    """The rows to train on, and the rows to evaluate on."""

    training: StepLoader
    evaluation: StepLoader | None = None


def fit(
    state: TrainState,
    data: StepLoaders,
    plan: Plan,
    observers: Sequence[Observer],
    checkpoints: Checkpoints,
    stop_requested: StopRequested,
    progress: Progress,
    meter: ThroughputMeter,
) -> int:
    """Train from `progress` to `plan.end_step`, until a rank requests a stop, or until
    `state.early_stopping` has stalled. Returns the last step done.

    Saves when a checkpoint is due, and at the end. Steps are counted from 1 in logs and names.
    Raises StepError if the loss or the gradient is not finite and for a spike of the loss, and
    UserError if a save fails.
    """
    strategy, scheduler, early_stopping = state.strategy, state.scheduler, state.early_stopping
    device = state.rank_info.device
    for observer in observers:
        observer.start(progress.step, plan.end_step)

    steps = AgreedSteps(
        load=partial(meter.time_data_wait, data.training.step_batch),
        steps=range(progress.step, plan.end_step),
        start_sum=strategy.start_sum,
        wants_to_end=lambda: stop_requested() or checkpoints.failed(),
        ended=early_stopping.has_stalled(),
    )

    def evaluate_now() -> float | None:
        if data.evaluation is None:
            return None
        loss = evaluate(strategy, data.evaluation, device, stop_requested)
        if loss is None:
            steps.ended = True
            return None
        _log(observers, [{"step": step, "eval_loss": loss}])
        if plan.is_scheduled_evaluation(step):
            scheduler.step_on_evaluation(loss)
            early_stopping.add(step, loss)
            steps.ended = early_stopping.has_stalled()
        return loss

    strategy.model.train()
    step, saved_step, eval_loss = progress.step, progress.step, None
    if step and plan.is_scheduled_evaluation(step) and not early_stopping.has_evaluated(step):
        evaluate_now()  # a stop came before or during this evaluation
    buffer = MetricsBuffer(
        strategy.sum, progress.tokens, plan.max_nonfinite_steps, meter, spikes=state.spikes
    )
    for step_batch, work in steps:
        state.step, eval_loss = step + 1, None
        step = state.step
        learning_rate = float(scheduler.get_last_lr()[0])
        buffer.diagnose = partial(first_bad_module, strategy.model, step_batch, device)
        targets = max(1, work.targets)  # streamed rows may have none: a loss of 0, not 0 / 0
        aux = state.router_loss
        router = None if aux is None else RouterShare(aux, max(1, work.tokens))
        stats = train_step(
            strategy, step_batch, targets, plan.max_grad_norm, device, plan.label_smoothing, router
        )
        if stats.applied:
            scheduler.step()
        buffer.add(step, learning_rate, stats, work)
        if plan.should_flush(step):
            _log(observers, buffer.flush())
            eval_loss = evaluate_now() if plan.should_evaluate(step) else None
            if plan.should_save(step) or (plan.save_best and early_stopping.is_lowest(step)):
                checkpoints.save(step, buffer.tokens, eval_loss)
                saved_step = step
            buffer.restart_clock()
    if step > saved_step:
        _log(observers, buffer.flush())
        checkpoints.save(step, buffer.tokens, eval_loss)
    checkpoints.finish()
    heartbeat.enter(Phase.FINISH)
    for observer in observers:
        observer.finish()
    return step


def train_step(
    strategy: Strategy,
    step_batch: StepBatch,
    targets: int,
    max_grad_norm: float,
    device: torch.device,
    label_smoothing: float = 0.0,
    router: RouterShare | None = None,
) -> StepStats:
    """One optimizer step. The loss is the sum over the target tokens of all ranks, divided by
    their number `targets`, plus the auxiliary loss of `router`."""
    reported = torch.zeros(1 if router is None else 2, device=device)
    for index, micro_batch in enumerate(step_batch.micro_batches, start=1):
        strategy.set_last_micro_batch(last=index == len(step_batch.micro_batches))
        loss, micro = weighted_losses(
            strategy.model, micro_batch.to(device), targets, label_smoothing, router
        )
        strategy.backward(loss)
        reported += micro
    heartbeat.enter(Phase.UPDATE)
    result = strategy.step(max_grad_norm)
    return StepStats(
        reported[0],
        result.grad_norm,
        result.applied,
        result.skip_if_nonfinite,
        result.loss_scale,
        None if router is None else reported[1],
    )


@torch.no_grad()
def evaluate(
    strategy: Strategy,
    loader: StepLoader,
    device: torch.device,
    stop_requested: StopRequested = lambda: False,
) -> float | None:
    """The mean loss per target token over one epoch of `loader`; None if a rank requests a stop
    during it. Collective."""
    strategy.model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    targets, epoch = 0, range(loader.steps_per_epoch)
    steps = AgreedSteps(loader.step_batch, epoch, strategy.start_sum, stop_requested, EVALUATION)
    for step_batch, work in steps:
        targets += work.targets
        for micro_batch in step_batch.micro_batches:
            loss += token_loss(strategy.model, micro_batch.to(device))
    strategy.model.train()
    return None if steps.ended else strategy.sum(loss).item() / targets


def _log(observers: Sequence[Observer], records: list[Record]) -> None:
    for observer in observers:
        observer.log(records)
