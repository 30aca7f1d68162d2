"""Numbers of steps, kept on the device until they are written: one wait a logging interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from launcher.errors import UserError
from launcher.meter import Meter, Work

Record = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step leaves behind."""

    loss: torch.Tensor  # 0-d fp32 on the device: this rank's share of the mean over targets
    grad_norm: torch.Tensor  # 0-d fp32, on the device or the CPU, of all ranks
    applied: bool = True  # whether the optimizer was asked to step
    guarded: bool = False  # if asked, it has not where the gradient was not finite
    loss_scale: float | None = None  # under fp16


@dataclass
class Ledger:
    """Collects steps and turns them into records, `sum` adding over ranks."""

    sum: Callable[[torch.Tensor], torch.Tensor]
    tokens: int = 0  # since the start of training
    patience: int = 1  # so many steps in a row without a finite gradient end the run
    meter: Meter = field(default_factory=lambda: Meter(torch.device("cpu")))
    blame: Callable[[], str] = lambda: ""  # what is to blame, for that end. Collective
    _bad: int = 0  # of these so far
    _pending: list[tuple[int, float, StepStats, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meter.restart()

    def add(self, step: int, learning_rate: float, stats: StepStats, work: Work) -> None:
        self.meter.lap(work)
        self._pending.append((step, learning_rate, stats, work.tokens))

    def flush(self) -> list[Record]:
        """The records of the steps since the last flush. Collective; waits for the device once.

        Steps whose loss or gradient norm is not finite are recorded as skipped. Raises UserError
        when one has changed the weights, or after `patience` of them in a row.
        """
        if not self._pending:
            return []
        losses = self.sum(torch.stack([stats.loss for _, _, stats, _ in self._pending]))
        norms = torch.stack([stats.grad_norm for _, _, stats, _ in self._pending])
        values = torch.stack([losses, norms.to(losses)]).tolist()
        figures = self.meter.read()
        records = []
        for (step, rate, stats, tokens), loss, norm in zip(self._pending, *values, strict=True):
            self._judge(step, loss, norm, stats)
            self.tokens += tokens
            record = {
                "step": step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": self.tokens,
                **figures,
                "time": round(time.time(), 3),
            }
            if stats.loss_scale is not None:
                record["loss_scale"] = stats.loss_scale
            if self._bad:
                record["skipped"] = True
            records.append({key: each for key, each in record.items() if math.isfinite(each)})
        self._pending.clear()
        return records

    def _judge(self, step: int, loss: float, norm: float, stats: StepStats) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            self._bad = 0
            return
        self._bad += 1
        harmless = stats.guarded or not stats.applied
        if harmless and self._bad < self.patience:
            return
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {norm}"
            + (f", the {self._bad}th step in a row that is not finite" if self._bad > 1 else "")
            + f"; training stops here. {self.blame()}Try a lower optimizer.learning_rate, or look "
            "at the rows of this step"
        )

    def restart_clock(self) -> None:
        """Leave the time since the last flush (evaluation, saving) out of the figures."""
        self.meter.restart()
