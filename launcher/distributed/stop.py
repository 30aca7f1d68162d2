"""A request to stop, noticed by each rank; the loop lets all ranks agree on it. Imports no torch.

Signals are taken by a thread: a rank that waits in a collective runs no Python handler. The first
asks for a checkpoint at the next step boundary, the second ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from launcher.distributed.deadline import Deadline

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SECONDS_BETWEEN_LOOKS = 0.2  # at the file: a shared file system answers slowly


class Stopped(Exception):
    """The work was given up before training began, because a stop was asked for."""


class Stop:
    """`RUN/stop`, a signal to this process, a time limit that comes near, or a newer attempt in the
    same run folder, which is this one's end. The file may say in a word who asks."""

    def __init__(self, file: Path, newer: Path, deadline: Deadline | None = None) -> None:
        """`newer`: the next attempt's folder. With a `deadline` Slurm decides when patience ends:
        it signals more than once, and every signal after the first is ignored."""
        self.file = file
        self._newer = newer
        self._deadline = deadline
        self._signal: str | None = None
        self._seen = False
        self._looked = 0.0

    def listen(self) -> None:
        """Take signals from here on. Call it early: torch's import takes seconds."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number in SIGNALS:  # what is ignored, as by a node's agent, would never be waited for
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=self._take_signals, daemon=True, name="stop").start()

    def requested(self) -> bool:
        """Whether this rank has been asked; the answer stays yes."""
        if self._deadline is not None and self._signal is None and self._deadline.is_near():
            self._ask("time limit")
        now = time.monotonic()
        if not self._seen and now - self._looked > SECONDS_BETWEEN_LOOKS:
            self._looked = now
            self._seen = self.file.exists() or self._newer.exists()
        return self._seen or self._signal is not None

    def training_begins(self) -> None:
        """From here on the time between two looks is that of a step."""
        if self._deadline is not None:
            self._deadline.begins()

    def raise_if_requested(self) -> None:
        if self.requested():
            raise Stopped

    def reason(self) -> str | None:
        """Who asked, as far as this rank knows; None where it was another."""
        try:
            return self.file.read_text(encoding="utf-8").strip() or self.file.name
        except OSError:
            return self._signal

    def _take_signals(self) -> None:
        self._ask(signal.Signals(signal.sigwait(SIGNALS)).name)
        again = signal.sigwait(SIGNALS)
        while self._deadline is not None:
            signal.sigwait(SIGNALS)
        os._exit(128 + again)

    def _ask(self, reason: str) -> None:
        self._signal = reason
        # Ranks that are not in a collective with this one, as while rows are tokenised, learn of it
        # by the file. On a full disk they learn of it later, from the loop.
        with contextlib.suppress(OSError), self.file.open("x", encoding="utf-8") as file:
            file.write(reason)
