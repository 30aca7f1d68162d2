"""The training loop: the only one, for every method, strategy and precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler

from launcher.data.loader import IGNORED, Loader, MicroBatch, Window
from launcher.metrics import Ledger, Record, StepStats
from launcher.strategy import Strategy


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps."""

    total_steps: int
    max_grad_norm: float
    eval_steps: int | None
    save_steps: int | None
    log_steps: int


class Observer(Protocol):
    """Watches a run; the step does not know of it."""

    def start(self, total_steps: int) -> None: ...
    def log(self, records: list[Record]) -> None: ...
    def finish(self) -> None: ...


def fit(
    strategy: Strategy,
    scheduler: LRScheduler,
    training: Loader,
    evaluation: Loader | None,
    plan: Plan,
    observers: list[Observer],
    save: Callable[[int], None],
    device: torch.device,
) -> None:
    """Train for `plan.total_steps` optimizer steps; call `save(step)` when it is time and at the
    end. Steps are counted from 1 in logs and names."""
    for observer in observers:
        observer.start(plan.total_steps)
    ledger = Ledger(strategy.sum)
    strategy.model.train()
    for step in range(1, plan.total_steps + 1):
        learning_rate = float(scheduler.get_last_lr()[0])
        stats = train_step(strategy, training.window(step - 1), plan.max_grad_norm, device)
        scheduler.step()
        ledger.add(step, learning_rate, stats)
        last = step == plan.total_steps
        evaluates = evaluation is not None and (last or _due(plan.eval_steps, step))
        saves = last or _due(plan.save_steps, step)
        if evaluates or saves or _due(plan.log_steps, step):
            _tell(observers, ledger.flush())
        if evaluation is not None and evaluates:
            _tell(observers, [{"step": step, "eval_loss": evaluate(strategy, evaluation, device)}])
        if saves:
            save(step)
        if evaluates or saves:
            ledger.restart_clock()
    for observer in observers:
        observer.finish()


def train_step(
    strategy: Strategy, window: Window, max_grad_norm: float, device: torch.device
) -> StepStats:
    """One optimizer step: the loss is a sum over target tokens, divided by their global count."""
    targets, tokens = strategy.sum(torch.stack([window.target_tokens, window.tokens])).tolist()
    loss = torch.zeros((), device=device)
    for index, micro_batch in enumerate(window.micro_batches, start=1):
        strategy.accumulate(last=index == len(window.micro_batches))
        part = token_loss(strategy.model, micro_batch.to(device)) / targets
        strategy.backward(part)
        loss += part.detach()
    result = strategy.step(max_grad_norm)
    return StepStats(loss, result.grad_norm, tokens)


def token_loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy in fp32, summed over the targets of `batch`. Causal, without attention mask."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def evaluate(strategy: Strategy, loader: Loader, device: torch.device) -> float:
    """Mean loss per target token over all rows of `loader`."""
    strategy.model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    targets = torch.zeros((), dtype=torch.int64)
    for window in loader.windows():
        targets += window.target_tokens
        for micro_batch in window.micro_batches:
            loss += token_loss(strategy.model, micro_batch.to(device))
    strategy.model.train()
    return (strategy.sum(loss).cpu() / strategy.sum(targets)).item()


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _tell(observers: list[Observer], records: list[Record]) -> None:
    for observer in observers:
        observer.log(records)
