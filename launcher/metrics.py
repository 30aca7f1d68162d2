"""Numbers of steps, kept on the device until they are written: one wait a logging interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from launcher.errors import UserError

Record = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step leaves behind."""

    loss: torch.Tensor  # 0-d fp32 on the device: this rank's share of the mean over targets
    grad_norm: torch.Tensor  # 0-d fp32 on the device, of all ranks
    tokens: int  # of all ranks, without padding


@dataclass
class Ledger:
    """Collects steps and turns them into records, `sum` adding over ranks."""

    sum: Callable[[torch.Tensor], torch.Tensor]
    tokens: int = 0  # since the start of training
    _pending: list[tuple[int, float, StepStats]] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def add(self, step: int, learning_rate: float, stats: StepStats) -> None:
        self._pending.append((step, learning_rate, stats))

    def flush(self) -> list[Record]:
        """The records of the steps since the last flush. Collective; waits for the device once.

        Raises UserError when a loss or gradient norm is not finite.
        """
        if not self._pending:
            return []
        losses = self.sum(torch.stack([stats.loss for _, _, stats in self._pending]))
        norms = torch.stack([stats.grad_norm for _, _, stats in self._pending])
        values = torch.stack([losses, norms.to(losses)]).tolist()
        now = time.perf_counter()
        rate = sum(stats.tokens for _, _, stats in self._pending) / max(now - self._since, 1e-9)
        records = []
        for (step, learning_rate, stats), loss, norm in zip(self._pending, *values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {norm}; training stops here. "
                    "Try a lower optimizer.learning_rate, or look at the rows of this step"
                )
            self.tokens += stats.tokens
            records.append(
                {
                    "step": step,
                    "loss": loss,
                    "learning_rate": learning_rate,
                    "grad_norm": norm,
                    "tokens": self.tokens,
                    "tokens_per_second": round(rate, 1),
                    "time": round(time.time(), 3),
                }
            )
        self._pending.clear()
        self._since = now
        return records

    def restart_clock(self) -> None:
        """Leave the time since the last flush (evaluation, saving) out of tokens_per_second."""
        self._since = time.perf_counter()
