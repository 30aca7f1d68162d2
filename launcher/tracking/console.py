"""Progress on the console: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from io import TextIOBase
from typing import NoReturn

from tqdm import tqdm

from launcher.metrics import Record

SECONDS_BETWEEN_LINES = 5.0
WAITS = 0.1  # share of the time from which on waiting for data is worth a word


class Progress:
    """Step, time left, loss, learning rate, tokens/s, where it is known MFU."""

    def __init__(self, console: TextIOBase) -> None:
        self.console = console
        self.bar: tqdm[NoReturn] | None = None
        self._done = self._total = 0
        self._began = self._last_line = 0.0

    def start(self, done_steps: int, total_steps: int) -> None:
        self._done, self._total = done_steps, total_steps
        self._began = self._last_line = time.monotonic()
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
                self._say(f"step {record['step']}: eval_loss {record['eval_loss']:.4f}")
        steps = [record for record in records if "loss" in record]
        if not steps:
            return
        newest = steps[-1]
        if self.bar is not None:
            self.bar.set_postfix_str(_figures(newest), refresh=False)
            self.bar.update(newest["step"] - self.bar.n)
        elif self._line_is_due(newest["step"]):
            self._say(
                f"step {newest['step']}/{self._total}  {_figures(newest)}  {self._left(newest)}"
            )

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _line_is_due(self, step: int) -> bool:
        now = time.monotonic()
        if step != self._total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True

    def _left(self, record: Record) -> str:
        per_step = (time.monotonic() - self._began) / (record["step"] - self._done)
        return f"{per_step * (self._total - record['step']):.0f} s left"

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.console)
        else:
            print(line, file=self.console, flush=True)


def _figures(record: Record) -> str:
    figures = [
        f"loss {record['loss']:.4f}",
        f"rate {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:.0f} tokens/s",
    ]
    if "mfu" in record:
        figures.append(f"MFU {record['mfu']:.1%}")
    if record["data_wait"] > WAITS:
        figures.append(f"waits for data {record['data_wait']:.0%}")
    return "  ".join(figures)
