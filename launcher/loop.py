"""The training loop: the only one, for every method, strategy and precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from launcher.data.loader import Window
from launcher.loss import token_loss
from launcher.meter import Meter, Work
from launcher.metrics import Ledger, Record, StepStats
from launcher.nonfinite import first_bad_module
from launcher.scheduler import Schedule
from launcher.strategy import Strategy
from launcher.watch import Watch


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps."""

    total_steps: int  # of the schedule
    end_step: int  # training ends here; less than total_steps where it is to be resumed
    max_grad_norm: float
    eval_steps: int | None
    save_steps: int | None
    log_steps: int
    label_smoothing: float = 0.0
    patience: int = 20  # so many steps in a row without a finite gradient end the run
    save_best: bool = False  # after every evaluation that is the best so far

    def evaluates(self, step: int) -> bool:
        return step == self.end_step or _due(self.eval_steps, step)

    def saves(self, step: int) -> bool:
        return step == self.end_step or _due(self.save_steps, step)

    def judges(self, step: int) -> bool:
        """Whether the schedule and the best go by this evaluation: one that a stop has brought
        about would not have been in an uninterrupted training."""
        return step == self.total_steps or _due(self.eval_steps, step)

    def pauses(self, step: int) -> bool:
        """Whether the loop does anything after this step but go on."""
        return self.evaluates(step) or self.saves(step) or _due(self.log_steps, step)


class Observer(Protocol):
    """Watches a run; the step does not know of it."""

    def start(self, done_steps: int, total_steps: int) -> None: ...
    def log(self, records: list[Record]) -> None: ...
    def finish(self) -> None: ...


class Windows(Protocol):
    """The batches of steps, counted from 0 over all epochs."""

    @property
    def steps_per_epoch(self) -> int: ...
    def window(self, step: int) -> Window: ...


class Checkpoints(Protocol):
    """Keeps what is learnt. All ranks call it alike; what fails on one raises on all."""

    def save(self, step: int, tokens: int, eval_loss: float | None) -> None:
        """Save what is learnt after `step`, now or in the background."""

    def failed(self) -> bool:
        """Whether a save in the background has come to nothing; the next call raises its cause."""

    def finish(self) -> None:
        """Wait until what was saved is on disk."""


# Whether this rank wants training to end. All ranks then end it at the same step.
Halt = Callable[[], bool]


def fit(
    strategy: Strategy,
    scheduler: Schedule,
    training: Windows,
    evaluation: Windows | None,
    plan: Plan,
    observers: list[Observer],
    checkpoints: Checkpoints,
    device: torch.device,
    halt: Halt,
    done_steps: int = 0,
    tokens: int = 0,
    watch: Watch | None = None,
    meter: Meter | None = None,
) -> int:
    """Train from `done_steps` to `plan.end_step`, or until a rank halts or the evaluation loss has
    stalled for the patience of `watch`; return the last step done.

    Saves when it is time, and at the end. Steps are counted from 1 in logs and names.
    """
    for observer in observers:
        observer.start(done_steps, plan.end_step)
    watch = watch or Watch()

    def look() -> float | None:
        if evaluation is None:
            return None
        loss = evaluate(strategy, evaluation, device, halt)
        if loss is not None:
            _tell(observers, [{"step": step, "eval_loss": loss}])
            if plan.judges(step):
                scheduler.evaluated(loss)
                watch.add(step, loss)
        return loss

    strategy.model.train()
    step, saved, eval_loss = done_steps, done_steps, None
    if step and plan.judges(step) and not watch.has_seen(step):
        look()  # a halt came before it, or in its midst
    ledger = Ledger(strategy.sum, tokens, plan.patience, meter or Meter(device))
    while step < plan.end_step:
        window = ledger.meter.waiting(training.window, step)
        halting = torch.tensor(int(halt() or checkpoints.failed() or watch.stalled()))
        *counts, halted = strategy.sum(torch.stack([*window.counts, halting])).tolist()
        if halted:
            break
        work = Work(*counts)
        step, eval_loss = step + 1, None
        learning_rate = float(scheduler.get_last_lr()[0])
        ledger.blame = partial(first_bad_module, strategy.model, window, device)
        targets = max(1, work.targets)  # streamed rows may have none: a loss of 0, not 0 / 0
        stats = train_step(
            strategy, window, targets, plan.max_grad_norm, device, plan.label_smoothing
        )
        if stats.applied:
            scheduler.step()
        ledger.add(step, learning_rate, stats, work)
        if plan.pauses(step):
            _tell(observers, ledger.flush())
            eval_loss = look() if plan.evaluates(step) else None
            if plan.saves(step) or (plan.save_best and watch.is_lowest(step)):
                checkpoints.save(step, ledger.tokens, eval_loss)
                saved = step
            ledger.restart_clock()
    if step > saved:
        _tell(observers, ledger.flush())
        checkpoints.save(step, ledger.tokens, eval_loss)
    checkpoints.finish()
    for observer in observers:
        observer.finish()
    return step


def train_step(
    strategy: Strategy,
    window: Window,
    targets: int,
    max_grad_norm: float,
    device: torch.device,
    label_smoothing: float = 0.0,
) -> StepStats:
    """One optimizer step: the loss is a sum over target tokens, divided by their count `targets`
    over all ranks."""
    loss = torch.zeros((), device=device)
    for index, micro_batch in enumerate(window.micro_batches, start=1):
        strategy.accumulate(last=index == len(window.micro_batches))
        loss_sum = token_loss(strategy.model, micro_batch.to(device), label_smoothing)
        part = loss_sum / targets
        strategy.backward(part)
        loss += part.detach()
    result = strategy.step(max_grad_norm)
    return StepStats(loss, result.grad_norm, result.applied, result.guarded, result.loss_scale)


@torch.no_grad()
def evaluate(
    strategy: Strategy, windows: Windows, device: torch.device, halt: Halt = lambda: False
) -> float | None:
    """Mean loss per target token over the epoch of `windows`; None when a rank halts meanwhile."""
    strategy.model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    targets, halting = 0, 0
    for window in map(windows.window, range(windows.steps_per_epoch)):
        counts = torch.stack([window.target_tokens, torch.tensor(int(halt()))])
        found, halting = strategy.sum(counts).tolist()
        if halting:
            break
        targets += found
        for micro_batch in window.micro_batches:
            loss += token_loss(strategy.model, micro_batch.to(device))
    strategy.model.train()
    return None if halting else strategy.sum(loss).item() / targets


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _tell(observers: list[Observer], records: list[Record]) -> None:
    for observer in observers:
        observer.log(records)
