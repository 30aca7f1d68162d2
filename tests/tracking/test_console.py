"""What the terminal shows of a run."""

from __future__ import annotations

import io
import re

from launcher.tracking.console import ConsoleProgress
from tests.helpers.tracking import record


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(console: io.StringIO) -> str:
    progress = ConsoleProgress(console)
    progress.start(0, 3)
    for step in (1, 2, 3):
        progress.log([record(step)])
    progress.log([{"step": 3, "eval_loss": 1.25}])
    progress.finish()
    return console.getvalue()


def test_a_terminal_gets_a_bar_with_loss_learning_rate_speed_and_time_left() -> None:
    text = watched(Terminal())
    assert re.search(r"3/3 \[00:00<00:00,", text), "time past < time left"
    assert "loss 2.5000" in text
    assert "rate 1.00e-04" in text
    assert "99 tokens/s" in text
    assert "step 3: eval_loss 1.2500" in text


def test_output_that_is_not_a_terminal_gets_plain_lines() -> None:
    text = watched(io.StringIO())
    assert "\r" not in text
    assert "step 3/3  loss 2.5000  rate 1.00e-04  99 tokens/s  0 s left" in text


def test_mfu_is_shown_if_known_and_waiting_for_data_is_reported() -> None:
    console = io.StringIO()
    progress = ConsoleProgress(console)
    progress.start(0, 1)
    progress.log([record(1, mfu=0.4123, data_wait=0.25)])
    (line,) = console.getvalue().splitlines()
    assert "99 tokens/s  MFU 41.2%  waits for data 25%  0 s left" in line
