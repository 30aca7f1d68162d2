"""Progress on the console: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from io import TextIOBase
from typing import NoReturn

from tqdm import tqdm

from launcher.tracking.base import Record

SECONDS_BETWEEN_LINES = 5.0
DATA_WAIT_SHOWN = 0.1  # the share of the time from which waiting for data is shown


class ConsoleProgress:
    """Shows step, loss, learning rate, tokens/s, time left, and MFU if it is known."""

    def __init__(self, console: TextIOBase) -> None:
        self.console = console
        self.bar: tqdm[NoReturn] | None = None
        self._done_steps = self._total_steps = 0
        self._start_time = self._last_line_time = 0.0

    def start(self, done_steps: int, total_steps: int) -> None:
        self._done_steps, self._total_steps = done_steps, total_steps
        self._start_time = self._last_line_time = time.monotonic()
        if self.console.isatty():
            self.bar = tqdm(
                total=total_steps,
                initial=done_steps,
                unit="step",
                file=self.console,
                dynamic_ncols=True,
            )

    def log(self, records: list[Record]) -> None:
        for record in records:
            if "eval_loss" in record:
                self._print(f"step {record['step']}: eval_loss {record['eval_loss']:.4f}")
        steps = [record for record in records if "loss" in record]
        if not steps:
            return
        last = steps[-1]
        if self.bar is not None:
            self.bar.set_postfix_str(_format_metrics(last), refresh=False)
            self.bar.update(last["step"] - self.bar.n)
        elif self._is_line_due(last["step"]):
            self._print(
                f"step {last['step']}/{self._total_steps}  {_format_metrics(last)}  "
                f"{self._format_time_left(last)}"
            )

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _is_line_due(self, step: int) -> bool:
        now = time.monotonic()
        if step != self._total_steps and now - self._last_line_time < SECONDS_BETWEEN_LINES:
            return False
        self._last_line_time = now
        return True

    def _format_time_left(self, record: Record) -> str:
        seconds_per_step = (time.monotonic() - self._start_time) / (
            record["step"] - self._done_steps
        )
        return f"{seconds_per_step * (self._total_steps - record['step']):.0f} s left"

    def _print(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.console)
        else:
            print(line, file=self.console, flush=True)


def _format_metrics(record: Record) -> str:
    metrics = [
        f"loss {record['loss']:.4f}",
        f"rate {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:.0f} tokens/s",
    ]
    if "mfu" in record:
        metrics.append(f"MFU {record['mfu']:.1%}")
    if record["data_wait"] > DATA_WAIT_SHOWN:
        metrics.append(f"waits for data {record['data_wait']:.0%}")
    return "  ".join(metrics)
