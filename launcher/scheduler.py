"""Learning-rate schedules: the values of transformers' and torch's own, by their usual names."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from launcher.config.scheduler import PlateauConfig, SchedulerConfig
from launcher.curve import factor


class Schedule(Protocol):
    """Sets the learning rate of every group of an optimizer."""

    def step(self) -> None:
        """After each applied optimizer step."""

    def evaluated(self, loss: float) -> None:
        """After each evaluation of the schedule, with the same `loss` on all ranks."""

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """The rate of each group for the next step."""

    def state(self) -> dict[str, Any]:
        """What `go_on_from` brings back to the bit, as JSON takes it."""

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Put the schedule where it was."""


def build_scheduler(
    config: SchedulerConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> Schedule:
    """The peak is the optimizer's `defaults["lr"]`; groups with another rate keep their ratio."""
    if isinstance(config, PlateauConfig):
        return Plateau(config, optimizer)
    return Curve(config, optimizer, total_steps)


class Curve(LambdaLR):
    """The rate depends on the number of applied steps alone."""

    def __init__(
        self, config: SchedulerConfig, optimizer: torch.optim.Optimizer, total_steps: int
    ) -> None:
        super().__init__(optimizer, partial(factor, config, optimizer.defaults["lr"], total_steps))

    def evaluated(self, loss: float) -> None:
        """It knows where it goes."""

    def state(self) -> dict[str, Any]:
        return {"steps": self.last_epoch}

    def go_on_from(self, state: dict[str, Any]) -> None:
        if state["steps"]:
            self.last_epoch = state["steps"] - 1
            self._step_count = state["steps"] + 1  # at 1 torch would warn of a step too early
            self.step()


class Plateau:
    """The rate depends on the evaluation losses so far (torch's ReduceLROnPlateau)."""

    KEPT = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")

    def __init__(self, config: PlateauConfig, optimizer: torch.optim.Optimizer) -> None:
        peak = optimizer.defaults["lr"]
        self._steps = 0
        self._optimizer = optimizer
        self._first = [group["lr"] for group in optimizer.param_groups]
        self._reducer = ReduceLROnPlateau(
            optimizer,
            factor=config.factor,
            patience=config.patience,
            threshold=config.threshold,
            cooldown=config.cooldown,
            min_lr=[config.minimum_rate * (rate / peak) for rate in self._first],
        )

    def step(self) -> None:
        self._steps += 1

    def evaluated(self, loss: float) -> None:
        self._reducer.step(loss)

    def get_last_lr(self) -> list[float | torch.Tensor]:
        return [group["lr"] for group in self._optimizer.param_groups]

    def state(self) -> dict[str, Any]:
        kept = {name: getattr(self._reducer, name) for name in self.KEPT}
        if not math.isfinite(kept["best"]):
            kept["best"] = None  # no loss was finite yet; JSON has no infinity
        rates = {"first": self._first, "rates": self.get_last_lr()}
        return {"steps": self._steps, "plateau": {**kept, **rates}}

    def go_on_from(self, state: dict[str, Any]) -> None:
        """A learning rate that has changed meanwhile is reduced as the old one was; a checkpoint of
        another scheduler says nothing of plateaus, and they are counted from here."""
        self._steps = state["steps"]
        if "plateau" not in state:
            return
        kept = state["plateau"]
        for name in self.KEPT:
            if kept[name] is not None:
                setattr(self._reducer, name, kept[name])
        groups = zip(
            self._optimizer.param_groups, self._first, kept["first"], kept["rates"], strict=True
        )
        for group, now, then, rate in groups:
            group["lr"] = rate * (now / then)
