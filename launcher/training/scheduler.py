"""Learning-rate schedules with the usual names, and the values of transformers and torch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from launcher.config.schema.scheduler import PlateauConfig, SchedulerConfig
from launcher.training.lr_curve import lr_factor


class Schedule(Protocol):
    """Sets the learning rate of every group of an optimizer."""

    def step(self) -> None:
        """Call this after each applied optimizer step."""

    def step_on_evaluation(self, loss: float) -> None:
        """Call this after each scheduled evaluation, with the same `loss` on all ranks."""

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each group for the next step."""

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint saves, for JSON."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned, to the bit."""


def build_scheduler(
    config: SchedulerConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> Schedule:
    """The schedule that `config` names. Its peak is the optimizer's `defaults["lr"]`; groups with
    another rate keep their ratio to it."""
    if isinstance(config, PlateauConfig):
        return PlateauSchedule(config, optimizer)
    return StepSchedule(config, optimizer, total_steps)


class StepSchedule(LambdaLR):
    """The learning rate depends only on the number of applied steps."""

    def __init__(
        self, config: SchedulerConfig, optimizer: torch.optim.Optimizer, total_steps: int
    ) -> None:
        peak = optimizer.defaults["lr"]
        super().__init__(optimizer, partial(lr_factor, config, peak, total_steps))

    def step_on_evaluation(self, loss: float) -> None:
        """Nothing to do: the loss does not change the learning rate."""

    def state(self) -> dict[str, Any]:
        return {"steps": self.last_epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["steps"]:
            self.last_epoch = state["steps"] - 1
            self._step_count = state["steps"] + 1  # with 1, torch would warn about an early step
            self.step()


class PlateauSchedule:
    """The learning rate depends on the evaluation losses so far (torch's ReduceLROnPlateau)."""

    SAVED_ATTRIBUTES = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")

    def __init__(self, config: PlateauConfig, optimizer: torch.optim.Optimizer) -> None:
        peak = optimizer.defaults["lr"]
        self._steps = 0
        self._optimizer = optimizer
        self._initial_rates = [group["lr"] for group in optimizer.param_groups]
        self._reducer = ReduceLROnPlateau(
            optimizer,
            factor=config.factor,
            patience=config.patience,
            threshold=config.threshold,
            cooldown=config.cooldown,
            min_lr=[config.minimum_rate * (rate / peak) for rate in self._initial_rates],
        )

    def step(self) -> None:
        self._steps += 1

    def step_on_evaluation(self, loss: float) -> None:
        self._reducer.step(loss)

    def get_last_lr(self) -> list[float | torch.Tensor]:
        return [group["lr"] for group in self._optimizer.param_groups]

    def state(self) -> dict[str, Any]:
        plateau = {name: getattr(self._reducer, name) for name in self.SAVED_ATTRIBUTES}
        if not math.isfinite(plateau["best"]):
            plateau["best"] = None  # no loss was finite yet; JSON has no infinity
        rates = {"first": self._initial_rates, "rates": self.get_last_lr()}
        return {"steps": self._steps, "plateau": {**plateau, **rates}}

    def load_state(self, state: dict[str, Any]) -> None:
        """If the initial learning rate has changed since, it is reduced by the same factor. A
        checkpoint of another scheduler has no plateaus; they are counted from here on."""
        self._steps = state["steps"]
        if "plateau" not in state:
            return
        plateau = state["plateau"]
        for name in self.SAVED_ATTRIBUTES:
            if plateau[name] is not None:
                setattr(self._reducer, name, plateau[name])
        groups = zip(
            self._optimizer.param_groups,
            self._initial_rates,
            plateau["first"],
            plateau["rates"],
            strict=True,
        )
        for group, initial_rate, saved_initial_rate, saved_rate in groups:
            group["lr"] = saved_rate * (initial_rate / saved_initial_rate)
