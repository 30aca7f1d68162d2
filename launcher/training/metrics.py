"""Metrics of steps, kept on the device until they are logged: one wait per logging interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from launcher.errors import StepError
from launcher.tracking.base import Record
from launcher.training.spikes import Spikes
from launcher.training.throughput import ThroughputMeter, Work


@dataclass(frozen=True)
class StepStats:
    """The metrics of one optimizer step."""

    loss: torch.Tensor  # 0-d fp32 on the device: this rank's part of the mean over target tokens
    grad_norm: torch.Tensor  # 0-d fp32, on the device or the CPU, over all ranks
    applied: bool = True  # False: the gradient was not finite, and the optimizer did not step
    # The optimizer skipped the step on the device if the gradient was not finite.
    skip_if_nonfinite: bool = False
    loss_scale: float | None = None  # with fp16
    # 0-d fp32 on the device: this rank's part of the routers' auxiliary loss, if it is trained on.
    aux_loss: torch.Tensor | None = None


class PendingStep(NamedTuple):
    """A step that is not logged yet."""

    step: int
    learning_rate: float
    stats: StepStats
    tokens: int


@dataclass
class MetricsBuffer:
    """Collects the metrics of steps, and turns them into records."""

    sum: Callable[[torch.Tensor], torch.Tensor]  # over all ranks
    tokens: int = 0  # since the start of training
    max_nonfinite_steps: int = 1  # the run ends after this many consecutive steps
    meter: ThroughputMeter = field(default_factory=lambda: ThroughputMeter(torch.device("cpu")))
    diagnose: Callable[[], str] = lambda: ""  # finds the cause for the error message. Collective
    spikes: Spikes = field(default_factory=Spikes)
    _nonfinite_steps: int = 0  # consecutive ones until now
    _pending: list[PendingStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meter.restart()

    def add(self, step: int, learning_rate: float, stats: StepStats, work: Work) -> None:
        """Add one step. Does not wait for the device."""
        self.meter.add_step(work)
        self._pending.append(PendingStep(step, learning_rate, stats, work.tokens))

    def flush(self) -> list[Record]:
        """The records of the steps since the last flush. Collective; waits for the device once.

        Steps whose loss or gradient norm is not finite are recorded as skipped. Raises StepError if
        such a step has changed the weights, and after `max_nonfinite_steps` consecutive ones; and
        SpikeError for a spike of the loss.
        """
        if not self._pending:
            return []
        stats = [pending.stats for pending in self._pending]
        summed = [torch.stack([each.loss for each in stats])]
        if aux_losses := [each.aux_loss for each in stats if each.aux_loss is not None]:
            summed.append(torch.stack(aux_losses))
        sums = self.sum(torch.stack(summed))
        norms = torch.stack([each.grad_norm.to(sums, non_blocking=True) for each in stats])
        losses, *aux, norms_read = torch.cat([sums, norms[None]]).tolist()
        throughput = self.meter.read()
        records = []
        for index, (pending, loss, norm) in enumerate(
            zip(self._pending, losses, norms_read, strict=True)
        ):
            self._check_finite(pending, loss, norm)
            self.tokens += pending.tokens
            record = {
                "step": pending.step,
                "loss": loss,
                "learning_rate": pending.learning_rate,
                "grad_norm": norm,
                **({"aux_loss": aux[0][index]} if aux else {}),
                "tokens": self.tokens,
                **throughput,
                "time": round(time.time(), 3),
            }
            if pending.stats.loss_scale is not None:
                record["loss_scale"] = pending.stats.loss_scale
            if self._nonfinite_steps:
                record["skipped"] = True
            if self.spikes.left_out:
                record["left_out_batches"] = len(self.spikes.left_out)
            # JSON has no infinity and no NaN.
            records.append({key: value for key, value in record.items() if math.isfinite(value)})
        self._pending.clear()
        return records

    def _check_finite(self, pending: PendingStep, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            self._nonfinite_steps = 0
            self.spikes.add(pending.step, loss)
            return
        self._nonfinite_steps += 1
        count, stats = self._nonfinite_steps, pending.stats
        weights_unchanged = stats.skip_if_nonfinite or not stats.applied
        if weights_unchanged and count < self.max_nonfinite_steps:
            return
        raise StepError(
            pending.step - count + 1,
            f"step {pending.step}: loss {loss}, gradient norm {norm}"
            + (f", not finite for {count} steps in a row" if count > 1 else "")
            + f"; training stops here. {self.diagnose()}Try a lower optimizer.learning_rate, or "
            "inspect the rows of this step",
        )

    def restart_clock(self) -> None:
        """Exclude the time since the last flush (evaluation, saving) from the throughput."""
        self.meter.restart()
