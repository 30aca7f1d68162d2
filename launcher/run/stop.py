"""A request to stop, detected by each rank; the training loop makes all ranks agree. No torch.

A thread receives the signals, because a rank that waits in a collective runs no Python handler. The
first signal asks for a checkpoint at the next step boundary. What arrives within the next seconds
is the same request: a supervisor signals every process of a group, and torchrun passes signals on.
A later signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from launcher.folders import regular
from launcher.folders.run import RunDir
from launcher.run import processes, rank_log
from launcher.run.deadline import Deadline

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
SAME_REQUEST_SECONDS = 5.0
POLL_SECONDS = 0.2  # between two checks of the file: a shared file system is slow


class Stopped(Exception):
    """A stop was requested before training started."""


def signals_to_receive() -> tuple[signal.Signals, ...]:
    """All of SIGNALS, but not SIGHUP under `nohup`."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(each for each in SIGNALS if each != signal.SIGHUP or not ignores_hangup)


class StopRequest:
    """A request to stop an attempt: the file `RUN/stop`, a signal to this process, a time limit
    that is near, or a newer attempt in the same run folder. The file may contain the reason.

    In a Slurm job, Slurm decides when to end the process. It signals more than once, so every
    signal after the first is ignored.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._newer_attempt = RunDir(run.path, run.attempt + 1).logs
        self._deadline = Deadline.from_job_file(run.job)
        self._reason: str | None = None
        self._last_check = 0.0

    def listen(self, as_rank: bool = True) -> None:
        """Receive signals from now on. Call it early: importing torch takes seconds.

        `as_rank`: SIGTERM from the parent, torchrun's agent, is not a request if a rank was lost.
        """
        numbers = signals_to_receive()
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:  # sigwait skips a signal that the parent ignores
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        receive = threading.Thread(
            target=self._receive_signals, args=(numbers, as_rank), daemon=True, name="stop"
        )
        receive.start()

    def requested(self) -> bool:
        """Whether this rank has been asked to stop; once true, it stays true."""
        if self._deadline is not None and self._reason is None and self._deadline.is_near():
            self.request("time limit")
        now = time.monotonic()
        if self._reason is None and now - self._last_check > POLL_SECONDS:
            self._last_check = now
            self._reason = self._reason_on_disk()
        return self._reason is not None

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
        return self._reason_on_disk() or self._reason

    def superseded_by(self) -> int | None:
        """The number of a newer attempt; None if there is none."""
        newest = self._run.newest_attempt().attempt
        return newest if newest > self._run.attempt else None

    def request(self, reason: str) -> None:
        """Ask all ranks to stop."""
        self._reason = reason
        # Ranks that are not in a collective with this one (rows are being tokenized) see the file.
        # If the disk is full, they see the request later, in the training loop.
        with contextlib.suppress(OSError), self._run.stop.open("x", encoding="utf-8") as file:
            file.write(reason)

    def _reason_on_disk(self) -> str | None:
        if self._newer_attempt.exists():
            return "a newer attempt has started"
        file = self._run.stop
        try:
            with regular.open_file(file) as opened:
                return opened.read().decode(errors="replace").strip() or file.name
        except FileNotFoundError:
            return None
        except OSError:
            return file.name

    def _receive_signals(self, numbers: tuple[signal.Signals, ...], as_rank: bool) -> None:
        first, first_time = None, 0.0
        while True:
            received = signal.sigwaitinfo(numbers)
            if as_rank and self._has_lost_rank(received):
                rank_log.report_lost_rank(self._run, int(os.environ["RANK"]))
                os._exit(128 + received.si_signo)
            if first is None:
                first, first_time = received, time.monotonic()
                self.request(signal.Signals(received.si_signo).name)
            elif self._deadline is None and (
                time.monotonic() - first_time > SAME_REQUEST_SECONDS
                or _is_second_ctrl_c(first, received)
            ):
                os._exit(128 + received.si_signo)

    def _has_lost_rank(self, received: signal.struct_siginfo) -> bool:
        """Whether the agent ends this rank because another one was lost. Saving is not possible
        then. Our own agent never passes a signal on, torchrun does."""
        ours = os.environ.get("SHARDWAY_AGENT") == str(os.getppid())
        return _is_from_agent(received, signal.SIGTERM) and (
            ours or processes.has_lost_one(self._run)
        )


def _is_from_agent(received: signal.struct_siginfo, number: int) -> bool:
    return received.si_signo == number and received.si_pid == os.getppid()


def _is_second_ctrl_c(first: signal.struct_siginfo, received: signal.struct_siginfo) -> bool:
    """torchrun passes SIGINT on. It sends SIGTERM after it when it receives SIGINT once more."""
    return _is_from_agent(first, signal.SIGINT) and _is_from_agent(received, signal.SIGTERM)
