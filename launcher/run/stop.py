"""A request to stop, detected by each rank; the training loop makes all ranks agree. No torch.

A thread receives the signals, because a rank that waits in a collective runs no Python handler. The
first signal asks for a checkpoint at the next step boundary, the second ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from launcher.run.deadline import Deadline

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
POLL_SECONDS = 0.2  # between two checks of the file: a shared file system is slow


class Stopped(Exception):
    """A stop was requested before training started."""


class StopRequest:
    """A request to stop this attempt: the file `RUN/stop`, a signal to this process, a time limit
    that is near, or a newer attempt in the same run folder. The file may contain the reason."""

    def __init__(self, file: Path, newer_attempt: Path, deadline: Deadline | None = None) -> None:
        """`file`: RUN/stop. `newer_attempt`: the folder of the next attempt.

        With a `deadline`, Slurm decides when to end the process. It signals more than once, so
        every signal after the first is ignored.
        """
        self.file = file
        self._newer_attempt = newer_attempt
        self._deadline = deadline
        self._reason: str | None = None
        self._file_exists = False
        self._last_check = 0.0

    def listen(self) -> None:
        """Receive signals from now on. Call it early: importing torch takes seconds."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        # A rank inherits the signals that its node's agent ignores, and sigwait skips those.
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=self._receive_signals, daemon=True, name="stop").start()

    def requested(self) -> bool:
        """Whether this rank has been asked to stop; once true, it stays true."""
        if self._deadline is not None and self._reason is None and self._deadline.is_near():
            self._request("time limit")
        now = time.monotonic()
        if not self._file_exists and now - self._last_check > POLL_SECONDS:
            self._last_check = now
            self._file_exists = self.file.exists() or self._newer_attempt.exists()
        return self._file_exists or self._reason is not None

    def on_train_begin(self) -> None:
        """From now on the time between two calls of `requested` is the time of a step."""
        if self._deadline is not None:
            self._deadline.reset()

    def raise_if_requested(self) -> None:
        """Raises Stopped if this rank has been asked to stop."""
        if self.requested():
            raise Stopped

    def reason(self) -> str | None:
        """Why this rank was asked to stop; None if only another rank knows."""
        try:
            return self.file.read_text(encoding="utf-8").strip() or self.file.name
        except OSError:
            return self._reason

    def _receive_signals(self) -> None:
        self._request(signal.Signals(signal.sigwait(SIGNALS)).name)
        second = signal.sigwait(SIGNALS)
        while self._deadline is not None:
            signal.sigwait(SIGNALS)
        os._exit(128 + second)

    def _request(self, reason: str) -> None:
        self._reason = reason
        # Ranks that are not in a collective with this one (rows are being tokenized) see the file.
        # If the disk is full, they see the request later, in the training loop.
        with contextlib.suppress(OSError), self.file.open("x", encoding="utf-8") as file:
            file.write(reason)
