"""Run torchrun on this machine: start it, wait for it, and report the first failure."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from launcher.cluster import command
from launcher.errors import HUNG
from launcher.folders import regular
from launcher.folders.json_file import COUNT, COUNTS, FINITE, FLAG, TEXT, check_fields, read_fields
from launcher.folders.run import RunDir
from launcher.run import stop
from launcher.run.rank_log import say

SHOWN_ROWS = 32  # of the step that failed, in a message
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Failure:
    """Why a rank failed."""

    rank: int
    exit_code: int
    message: str
    kind: str = "error"  # of launcher/run/rank_log.py, or killed, hung
    step: int | None = None  # of the training; None: before the first, or not known
    rows: tuple[int, ...] = ()  # of that step, as `shardway data preview` numbers them


def launch(run: RunDir, nproc_per_node: int, gpus: int, numa_mode: str | None = None) -> int:
    """Run all ranks until they end. Returns the exit status of the attempt. A request to stop that
    the ranks have not fulfilled, and the record of this process, stay.

    Rank 0 prints to this process's stdout; the output of the agent and of libraries goes to logs.
    """
    with _receive_signals(run) as signals, (run.logs / "torchrun.log").open("wb") as log:
        # A blocked signal waits until the agent receives it: none ends an agent that just starts.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, stop.signals_to_receive())
        signals.agent = subprocess.Popen(
            command.torchrun_command(run.path, run.attempt, nproc_per_node, numa_mode),
            stdin=subprocess.DEVNULL,
            stderr=log,
            env={
                **command.rank_environment(nproc_per_node, gpus),
                "SHARDWAY_LAUNCHER": str(os.getpid()),
            },
            start_new_session=True,  # Ctrl-C in a terminal reaches only this process
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if signals.ended_by:  # before there was an agent
            signals.agent.kill()
        status = signals.agent.wait()
    if status in (0, HUNG) and run.status.is_file():
        return int(read_fields(run.status, exit_code=COUNT)["exit_code"])
    # Its own second signal ends the agent with 128 + N.
    ended_by = signals.ended_by or (status - 128 if status > 128 else None)
    if ended_by:
        say(run, f"\nended by {signal.Signals(ended_by).name}; all ranks have ended: {run.path}")
        return 128 + ended_by
    failure = first_failure(run)
    if failure is None and status < 0:
        name = signal.Signals(-status).name
        say(run, f"torchrun was ended by signal {name}, its ranks with it")
        return 128 - status
    say(run, describe_failure(run, failure))
    return failure.exit_code if failure else status or 1


@dataclass
class _Signals:
    """The signals to this process: the first asks the ranks to stop with a checkpoint, a second
    request ends them at once."""

    run: RunDir
    agent: subprocess.Popen[bytes] | None = None
    first: signal.Signals | None = None
    first_time: float = 0.0
    ended_by: signal.Signals | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        if self.first is None:
            self.first, self.first_time = received, now
            said = "stopping with a checkpoint at the next step"
            try:
                regular.write_text(self.run.stop, received.name)
            except OSError as error:
                if not self.run.stop.exists():  # a file without text is a request, too
                    said = f"{self.run.stop} cannot be written: {error.strerror}"
            say(self.run, f"\n{said}; signal again to end at once")
            return
        # Only a person sends SIGINT twice; a supervisor may send several signals for one request.
        is_ctrl_c = received == self.first == signal.SIGINT
        if is_ctrl_c or now - self.first_time > stop.SAME_REQUEST_SECONDS:
            self.ended_by = received
            if self.agent is not None:
                self.agent.kill()  # its ranks end with it (launcher/run/parent.py)


@contextmanager
def _receive_signals(run: RunDir) -> Iterator[_Signals]:
    """Receive signals during the block. An ignored signal stays ignored, as `nohup` requires."""
    signals = _Signals(run)
    previous = {
        number: signal.signal(number, signals.receive)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def first_failure(run: RunDir) -> Failure | None:
    """The rank that failed first, from the ranks' own reports or from the agent's summary."""
    reports = rank_reports(run)
    killed = _killed_rank(run)
    if reports:
        first = min(reports, key=lambda report: report["time"])
        # A killed rank writes no report; the other ranks then fail because they have lost it.
        if killed is None or not first["lost_peer"]:
            return Failure(
                *(first["rank"], first["exit_code"], first["message"]),
                first.get("kind") or "error",
                first.get("step"),
                tuple(first.get("rows") or ()),
            )
        if killed is not None:  # the ranks that have lost it know the step
            return replace(killed, step=first.get("step"), rows=tuple(first.get("rows") or ()))
    return killed


def rank_reports(run: RunDir) -> list[dict[str, Any]]:
    """The ranks' own reports. Raises DamagedFile for one that cannot be read."""
    fields = {"rank": COUNT, "time": FINITE, "message": TEXT, "exit_code": COUNT, "lost_peer": FLAG}
    optional = {"kind": TEXT, "step": COUNT, "rows": COUNTS}
    reports = []
    for path in run.log_files("rank-*.error.json"):
        reports.append(read_fields(path, **fields))
        check_fields(path, reports[-1], optional)
    return reports


def lost_a_node(run: RunDir, world_size: int) -> bool:
    """Whether a machine was lost: some ranks left no report, and all others failed only because
    they had lost a rank."""
    reports = rank_reports(run)
    only_lost_peers = all(report["lost_peer"] for report in reports)
    return 0 < len(reports) < world_size and only_lost_peers and _killed_rank(run) is None


def _killed_rank(run: RunDir) -> Failure | None:
    """A rank that a signal ended, according to torchrun's summary. The agent itself ends the other
    ranks with SIGTERM, so that signal counts only for the root cause."""
    logs = run.log_files("torchrun*.log")
    summary = "\n".join(log.read_text(errors="replace") for log in logs)
    pattern = r"rank\s*: (\d+) .*\n\s*exitcode\s*: -(\d+)"
    killed = re.findall(pattern, summary)
    root_cause = re.findall(pattern, summary.rpartition("Root Cause")[2])
    for rank, code in killed:
        number = int(code)
        if number != signal.SIGTERM or (rank, code) in root_cause:
            hint = "; often the machine ran out of memory" if number == signal.SIGKILL else ""
            message = f"ended by signal {signal.Signals(number).name}{hint}"
            return Failure(int(rank), 128 + number, message, "killed")
    return None


def describe_failure(run: RunDir, failure: Failure | None) -> str:
    """The message of the first failure, and the log with more details."""
    if failure is None:
        return f"The ranks ended without an error message. Logs: {run.logs / 'torchrun*.log'}"
    rows = f"\n{describe_rows(failure)}" if failure.kind in ("step", "spike") else ""
    return f"rank {failure.rank} failed: {failure.message}{rows}\nLog: {run.rank_log(failure.rank)}"


def describe_rows(failure: Failure) -> str:
    """The rows of the step that failed, as a line; empty if they are not known."""
    if not failure.rows:
        return ""
    shown = ", ".join(map(str, failure.rows[:SHOWN_ROWS]))
    more = len(failure.rows) - SHOWN_ROWS
    rest = f" and {more:,} more" if more > 0 else ""
    return f"Rows of step {failure.step}: {shown}{rest} (shardway data preview … --row N)"
